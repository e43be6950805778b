"""The audit hook: what Python code may not do, refused with a message that names it.

Behind the kernel's walls it only says clearly what they refuse anyway. Without them it is the wall,
for Python code; native code does not see it.
"""

import os
import socket

from sandbox_child import Refusal, RefusedImport

# Names of CPython's audit events that Python code may not cause: processes, signals, sockets.
REFUSED = frozenset(
    [
        "os.fork",
        "os.forkpty",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.startfile",
        "os.kill",
        "os.killpg",
        "pty.spawn",
        "subprocess.Popen",
        "signal.pthread_kill",
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.sendmsg",
        "socket.getaddrinfo",
        "socket.gethostbyname",
    ]
)
# Refused where the hook itself protects something: the verdict (one process) or the files (no
# mount namespace).
REFUSED_BESIDE_SECRETS = frozenset(
    [
        "sys.addaudithook",
        "sys.monitoring.register_callback",
        "sys._current_frames",
        "sys._current_exceptions",
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
    ]
)
# Refused during a test in the same process, because a trace function may skip lines. Earlier,
# doctest needs it.
REFUSED_IN_TEST = frozenset(["sys.settrace", "sys.setprofile"])
REFUSED_NATIVE = frozenset(["code.__new__"])
NATIVE_MODULES = frozenset(
    [
        "ctypes",
        "_ctypes",
        "_ctypes_test",
        "_testcapi",
        "_testinternalcapi",
        "_xxsubinterpreters",
        "_interpreters",
        "cffi",
    ]
)
CHANGES_FILES = frozenset(
    [
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "os.utime",
        "os.setxattr",
        "os.removexattr",
        "shutil.rmtree",
        "shutil.move",
    ]
)


def audit_hook(native, fence, testing=None):
    """The function for sys.addaudithook.

    Args:
        native: whether programs may load native code (ctypes), as big libraries do.
        fence: the only directory to write in, if there is no mount namespace; else None.
        testing: if the verdict is given in this process, a list that gets an element when the test
            begins; else None.
    """
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    realpath, fsdecode, inside = os.path.realpath, os.fsdecode, f"{fence}{os.sep}"
    is_directory = os.path.isdir
    null = os.devnull
    refusal, refused_import = Refusal, RefusedImport  # the module's names are cleared
    refused = REFUSED
    if fence is not None or testing is not None:
        refused |= REFUSED_BESIDE_SECRETS
    if not native:
        refused |= REFUSED_NATIVE
    modules = frozenset() if native else NATIVE_MODULES
    # We cause each of these events once more, to end the program's tracing. If the program causes
    # it first (from a trace function, between two stages), our call fails, and so does the program.
    changes, in_test, ours = CHANGES_FILES, REFUSED_IN_TEST, set(REFUSED_IN_TEST)
    local = int(getattr(socket, "AF_UNIX", -1)), int(socket.SOCK_STREAM)

    def outside(path):
        if not isinstance(path, (str, bytes)):
            return False
        real = realpath(fsdecode(path))
        return not real.startswith(inside) and real != null

    def in_proc(path):
        return realpath(fsdecode(path)).startswith("/proc")

    def hook(event, args):
        if event in refused:
            raise refusal(f"{event} is not allowed in the sandbox")
        # A pair of connected sockets, as asyncio needs one, reaches nobody.
        if event == "socket.__new__" and (args[1], args[2]) != local:
            raise refusal(f"{event} is not allowed in the sandbox")
        if testing and event in in_test:
            if event not in ours:
                raise refusal(f"{event} is not allowed during the test")
            ours.remove(event)
        if event == "import" and args[0] in modules:
            raise refused_import(f"{args[0]} is not allowed in the sandbox")
        if not native and event.startswith("ctypes."):
            raise refusal(f"{event} is not allowed in the sandbox")
        if fence is None:
            return
        if event == "open":
            path, mode, flags = args
            # A path relative to a directory's descriptor could lead anywhere, unseen by this hook.
            if mode is None and is_directory(path):
                raise refusal(f"{path!r} is a directory: no descriptors of them")
            if outside(path) and (flags & writes or in_proc(path)):
                raise refusal(f"{path!r} is outside the sandbox")
        elif event in changes and any(outside(path) for path in args):
            raise refusal(f"{event} outside the sandbox")

    return hook
