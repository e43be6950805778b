"""The sandbox's innermost side: the process of one program, and how it proves that it ended well.

How success is decided: a program succeeded when its end was reached, not when it exits with 0. Its
process draws a nonce and sends it to the server, which must have it before any program code runs.
From then on the nonce lies only on the interpreter's evaluation stack, below the calls that run
the program (`_run`): no variable, attribute or container that Python code can reach refers to it,
and the audit hook refuses gc's views of the stack. When all stages have returned, the nonce is
sent again; two equal messages and nothing else are a success. Around the test, a guard compares
the builtins and the modules that tests call with what they were, and refuses threads and timers
left behind.

The limits of this: within one process, Python code is no boundary. A program that runs native code
or forges byte code could read the nonce from memory; ctypes and new code objects are refused
unless `native` is on (big libraries need them). And a function may return an object that claims to
equal everything: that is the test's weakness, not the sandbox's.
"""

import builtins
import functools
import gc
import operator
import os
import signal
import sys

import sandbox_jail as jail

NONCE_BYTES = 16
DETAIL_BYTES = 2000

# Modules that tests call; a program that replaces something in one of them fails.
WATCHED = [
    "_thread",
    "collections",
    "copy",
    "decimal",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "signal",
    "statistics",
    "string",
    "typing",
    "numpy",
    "numpy.testing",
    "pandas",
    "pandas.testing",
    "torch.testing",
    "tensorflow.test",
]

# What Python code may not do, by the name of CPython's audit event.
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
        "socket.__new__",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "sys.addaudithook",
        "sys.monitoring.register_callback",
        "sys._current_frames",
        "sys._current_exceptions",
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
    ]
)
# From the test on: a trace function may jump over lines. Before, doctest needs it.
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


def audit_hook(native, fence, testing):
    """The function for sys.addaudithook.

    Args:
        native: whether programs may load native code (ctypes), as big libraries do.
        fence: where there is no mount namespace, the only directory to write in; else None.
        testing: a list that gets an element when the test begins.
    """
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    realpath, fsdecode, inside = os.path.realpath, os.fsdecode, f"{fence}{os.sep}"
    is_directory = os.path.isdir
    refused = REFUSED if native else REFUSED | REFUSED_NATIVE
    modules = frozenset() if native else NATIVE_MODULES
    # Each is needed once more, to end the program's own tracing: if the program uses it up (from
    # a trace function, between two stages), that end fails, and with it the program.
    changes, in_test, ours = CHANGES_FILES, REFUSED_IN_TEST, set(REFUSED_IN_TEST)

    def outside(path):
        return isinstance(path, (str, bytes)) and not realpath(fsdecode(path)).startswith(inside)

    def in_proc(path):
        return realpath(fsdecode(path)).startswith("/proc")

    def hook(event, args):
        if event in refused:
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if testing and event in in_test:
            if event not in ours:
                raise PermissionError(f"{event} is not allowed during the test")
            ours.remove(event)
        if event == "import" and args[0] in modules:
            raise ImportError(f"{args[0]} is not allowed in the sandbox")
        if not native and event.startswith("ctypes."):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if fence is None:
            return
        if event == "open":
            path, mode, flags = args
            # Paths relative to a directory's descriptor would lead anywhere, unseen from here.
            if mode is None and is_directory(path):
                raise PermissionError(f"{path!r} is a directory: no descriptors of them")
            if outside(path) and (flags & writes or in_proc(path)):
                raise PermissionError(f"{path!r} is outside the sandbox")
        elif event in changes and any(outside(path) for path in args):
            raise PermissionError(f"{event} outside the sandbox")

    return hook


GUARD = """
for name, module in watched:
    if modules.get(name) is not module:
        raise SystemError(f"the program replaced the module {name}")
for entries, callables in contents:
    for name, value in callables:
        if entries.get(name) is not value:
            raise SystemError(f"the program replaced {name}")
if program.get("__builtins__", expected) is not expected:
    raise SystemError("the program replaced its builtins")
# What the test looks up is a copy: replacing builtins for the length of a call does not reach it.
program["__builtins__"] = expected = private
if threads() > before or callbacks:
    raise SystemError("the program left a thread or a callback of gc behind")
for kind in timers:
    stop(kind, 0)
"""


def guard_names(program, text):
    """The namespace of GUARD, which runs twice in it: the modules as they are now, own builtins.

    Only modules that `text` mentions are watched: each look at an object costs a copied page here.
    """
    import _thread

    mentioned = [name for name in WATCHED if name.partition(".")[0] in text]
    watched = [(n, sys.modules[n]) for n in ("builtins", *mentioned) if n in sys.modules]
    return {
        "__builtins__": dict(builtins.__dict__),
        "modules": sys.modules,
        "watched": watched,
        "contents": [
            (module.__dict__, [(k, v) for k, v in module.__dict__.items() if callable(v)])
            for _, module in watched
        ],
        "program": program,
        "expected": builtins.__dict__,
        "private": dict(builtins.__dict__),
        "callbacks": gc.callbacks,
        "threads": _thread._count,
        "before": _thread._count(),
        "timers": (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF),
        "stop": signal.setitimer,
    }


def stages(code, test, testing):
    """What to do: program, beginning of the test, end of tracing, guard, test, guard. All C code.

    Each is called with the None that the one before it returned: for exec it is `locals`, as if
    left out; for the others it is what they need.
    """
    names = {}
    run = functools.partial(exec, compile(code, "<program>", "exec"), names)
    trusted = functools.partial(exec, compile(test, "<test>", "exec"), names)
    guard = functools.partial(
        exec, compile(GUARD, "<guard>", "exec"), guard_names(names, code + test)
    )
    # A profile function gets to see the C functions that it is told of, and so `testing` as
    # __self__ of its append; it is not told of partials.
    begin = functools.partial(testing.append)
    return [run, begin, sys.setprofile, sys.settrace, guard, trusted, guard]


def _run(write, first, take_nonce, take):
    # Evaluated from the left: the nonce and all seven stages, the last one first, lie on the
    # evaluation stack, and nowhere else, before the innermost call runs the program. (An iterator
    # over the stages would take a StopIteration of the program for their end: a success.)
    write(first((take_nonce(), take()(take()(take()(take()(take()(take()(take()())))))))))


def describe(error, size=DETAIL_BYTES, padding=b" " * NONCE_BYTES):
    """An exception as bytes; its text is the program's, so anything can happen."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = "an exception that cannot be shown"
    # Never as long as a nonce, and marked.
    return b"E" + text.encode("utf-8", "replace")[:size] + padding


def run_child(job, config, channel):
    """The life of a program's process, from the fork to its end; never returns.

    What the program can reach through its caller's frames is only this function's variables: the
    module's own names are cleared before it runs.
    """
    leave, write, tell, run = os._exit, functools.partial(os.write, 3), describe, _run
    first = operator.itemgetter(0)
    try:
        nonces = [enter_child(job, config, channel)]
        take_nonce = nonces.pop
        testing = []
        sys.addaudithook(audit_hook(config["native"], config["fence"], testing))
        take = stages(job["code"], job["test"], testing).pop
        if not config["native"]:
            for name in NATIVE_MODULES & sys.modules.keys():
                del sys.modules[name]
        del job, config, channel, nonces, testing
        forget()
        run(write, first, take_nonce, take)
    except BaseException as error:
        write(tell(error))
    leave(0)


def forget():
    """Empties the sandbox's own modules, whose names a program could reach through its callers."""
    own = [sys.modules.pop(name) for name in ("sandbox_jail", "sandbox_program", "__main__")]
    sys.modules["__main__"] = type(sys)("__main__")  # doctest and pickle look for one
    for module in own:
        names = module.__dict__
        kept = names["__builtins__"]
        names.clear()
        names["__builtins__"] = kept  # Python 3.9 looks there for every new frame


def enter_child(job, config, channel):
    """Shuts a fork of the server in as the program's process and commits to a nonce.

    Returns: the nonce.
    """
    os.setsid()
    os.dup2(1, 2)  # both lead to /dev/null: what a program prints is of no use
    os.dup2(channel.detach(), 3)
    os.closerange(4, 256)
    os.chdir(config["workdir"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    jail.limit(config, job["limit_s"])
    if jail.LINUX:
        jail.drop_privileges(config["seccomp"])
    nonce = os.urandom(NONCE_BYTES)
    os.write(3, nonce)
    os.read(3, 1)  # the server has it: nothing to read back from the channel any more
    return nonce
