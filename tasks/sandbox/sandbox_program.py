"""The process of one untrusted program, and how it proves that it ended well.

A program succeeds if it reaches its end; an exit status of 0 proves nothing. Its process draws a
nonce and sends it to the server, which has it before any code of the program runs. From then on the
nonce is only on the interpreter's evaluation stack, below the calls that run the program (`_run`):
no variable, attribute or container that Python code can reach refers to it, and the audit hook
refuses gc's views of the stack. When all stages have returned, the nonce is sent again. Two equal
messages and nothing else are a success. Before and after the test, a guard compares the builtins
and the modules that tests call with their state before the program ran, and refuses threads and
timers that the program has left.

The limits: Python code cannot be fenced in within one process. A program that runs native code or
forges byte code could read the nonce from memory; ctypes and new code objects are therefore refused
unless `native` is on (big libraries need them). A function may also return an object that claims to
equal everything; that is a weakness of the test, not of the sandbox.
"""

import ast
import builtins
import errno
import fcntl
import functools
import gc
import operator
import os
import signal
import socket
import sys
import types

import sandbox_jail as jail
import sandbox_link as wire

PROGRAM = "program"  # the name of its module: it runs as if imported
OPEN_FILES = 256  # no descriptor of the server is higher

NONCE_BYTES = 16
DETAIL_BYTES = 2000

# Modules that tests call; a program that replaces a function in one of them fails.
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


class Refusal(PermissionError):
    """What the sandbox does not allow; the verdict on such a program is "refused"."""


class RefusedImport(ImportError):
    """A module that the sandbox does not allow."""


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


def chain(error):
    """An exception and those from which it was raised."""
    found = []
    while error is not None and len(found) < 50:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def is_refusal(
    error, chain=chain, kinds=(Refusal, RefusedImport), numbers=(errno.EPERM, errno.EROFS)
):
    """Whether an exception comes from what the sandbox does not allow, as far as it shows."""
    try:
        return any(
            isinstance(part, kinds) or (isinstance(part, OSError) and part.errno in numbers)
            for part in chain(error)
        )
    except BaseException:
        return False  # an exception of the program's own class


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
# The test gets a copy of the builtins: replacing builtins during a call does not change it.
program["__builtins__"] = expected = private
if threads() > before or callbacks:
    raise SystemError("the program left a thread or a callback of gc behind")
for kind in timers:
    stop(kind, 0)
"""


def guard_names(program, text):
    """The namespace in which GUARD runs twice: the present state of the modules, own builtins.

    Only modules that `text` mentions are watched: in a fork, each look at an object copies a page.
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
    """The stages, all C functions: program, begin test, end tracing (two), guard, test, guard.

    Each stage is called with the None that the one before it returned. For exec that is `locals`,
    as if it were left out; the others need a None.
    """
    names = {}
    run = functools.partial(exec, compile(code, "<program>", "exec"), names)
    trusted = functools.partial(exec, compile(test, "<test>", "exec"), names)
    guard = functools.partial(
        exec, compile(GUARD, "<guard>", "exec"), guard_names(names, code + test)
    )
    # A profile function sees the C functions that are called, and so `testing` as __self__ of its
    # append. It does not see partials.
    begin = functools.partial(testing.append)
    return [run, begin, sys.setprofile, sys.settrace, guard, trusted, guard]


def _run(write, first, take_nonce, take):
    # Python evaluates from the left: before the innermost call runs the program, the nonce and all
    # seven stages, the last one first, are on the evaluation stack and nowhere else. (An iterator
    # over the stages would take the program's StopIteration for their end, and so for success.)
    write(first((take_nonce(), take()(take()(take()(take()(take()(take()(take()())))))))))


def describe(error, refused=False, size=DETAIL_BYTES, padding=b" " * NONCE_BYTES):
    """An exception as bytes. Its text comes from the program, so anything may happen."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = "an exception that cannot be shown"
    # Marked, and longer than a nonce, so that it cannot be taken for one.
    return (b"X" if refused else b"E") + text.encode("utf-8", "replace")[:size] + padding


def run_together(job, config, channel):
    """Runs program and test in this process from the fork to its end; never returns.

    Through its callers' frames, the program can reach only this function's variables, because the
    module's names are cleared before it runs.
    """
    leave, write, tell, run = os._exit, functools.partial(os.write, 3), describe, _run
    first, is_refused = operator.itemgetter(0), is_refusal
    try:
        nonces = [draw_nonce(job, config, channel)]
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
        write(tell(error, is_refused(error)))
    leave(0)


def forget():
    """Empties the sandbox's own modules: a program could reach their names through its callers."""
    names = [name for name in sys.modules if name.startswith("sandbox_")]
    own = [sys.modules.pop(name) for name in [*names, "__main__"]]
    sys.modules["__main__"] = type(sys)("__main__")  # doctest and pickle look for one
    for module in own:
        names = module.__dict__
        kept = names["__builtins__"]
        names.clear()
        names["__builtins__"] = kept  # Python 3.9 looks there for every new frame


def draw_nonce(job, config, channel):
    """Isolates a fork of the server as the program's process, and sends the server a nonce.

    Returns: the nonce.
    """
    enter_child(config, job["limit_s"], [channel])
    nonce = os.urandom(NONCE_BYTES)
    os.write(3, nonce)
    os.read(3, 1)  # the server has the nonce, so the program cannot read it back
    return nonce


def enter_child(config, limit_s, descriptors):
    """Isolates a fork of the server; `descriptors` become 3, 4 and so on, all others close."""
    os.setsid()
    os.dup2(1, 2)  # both are /dev/null: nobody reads what a program prints
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 16) for descriptor in descriptors]
    for number, descriptor in enumerate(high, 3):
        os.dup2(descriptor, number)
    os.closerange(3 + len(high), OPEN_FILES)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    jail.limit(config, limit_s)
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[config["uid"]] * 3)
        os.setresuid(*[config["uid"]] * 3)
    os.chdir(config["workdir"])
    if jail.LINUX:
        jail.drop_privileges(config["seccomp"])


class ProgramLink(wire.Link):
    """The program's end: it does what the judge asks for."""

    def __init__(self, descriptor, names):
        super().__init__(descriptor)
        self._operations = {
            "call": lambda target, *args, **kwargs: target(*args, **kwargs),
            "names": lambda _, *wanted: {name: names[name] for name in wanted if name in names},
            "get": getattr,
            "set": setattr,
            "item": operator.getitem,
            "iter": iter,
            "next": next,
            "len": len,
            "bool": bool,
        }

    def _try(self, operation, target, args, kwargs):
        try:
            return "value", self._operations[operation](target, *args, **kwargs)
        except BaseException as error:
            return "refused" if is_refusal(error) else "error", error

    def _lost(self, error):
        os._exit(0)

    def _make(self, number, kind):
        """A function, an iterator or a mere object in place of what the test has passed."""
        if kind == "object":
            return object()

        def call(*args, **kwargs):
            return self.ask("call", call, *args, **kwargs)

        def items():
            while True:
                try:
                    yield self.ask("next", iterator)
                except StopIteration:
                    return

        iterator = items()
        return call if kind == "function" else iterator


def refuse_rebinding(code, helpers):
    """Refuses a program that defines twice what the test uses beside the function to judge.

    Where the caller does not say which part of the text is the task's, that is all that tells a
    task's helper function from the program's replacement of it.
    """
    if not any(name in code for name in helpers):
        return
    bound = []
    todo = ast.parse(code).body
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.append(node.name)
            bound += [
                n for part in ast.walk(node) if isinstance(part, ast.Global) for n in part.names
            ]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.append(node.id)
        else:
            todo += ast.iter_child_nodes(node)
    for name in helpers:
        if bound.count(name) > 1:
            raise SystemError(f"the program defines {name} more than once; the test relies on it")


def run_apart(job, config, channel):
    """Runs the program, then answers the judge's calls; never returns.

    It tells the server b"." when the program has reached its end, or why it has not.
    """
    try:
        enter_child(config, job["limit_s"], [channel])
        walls = config["seccomp"] is not None and (config["namespaces"] or config["landlock"])
        native = config["native"] or walls
        sys.addaudithook(audit_hook(native, config["fence"]))
        module = types.ModuleType(PROGRAM)
        names = module.__dict__
        names["__file__"] = f"{config['workdir']}/{PROGRAM}.py"
        sys.modules[PROGRAM] = module
        sys.modules["__main__"] = types.ModuleType("__main__")  # doctest and pickle look for one
        code = job["code"][job["code"].startswith("\ufeff") :]  # a file's mark of its encoding
        refuse_rebinding(code, job["helpers"])
        exec(compile(code, "<program>", "exec"), names)
        exec(compile(job["imports"], "<imports of the test>", "exec"), names)
    except BaseException as error:
        os.write(3, describe(error, is_refusal(error)))
        os._exit(0)
    link = ProgramLink(3, names)
    os.write(3, b".")
    while True:
        try:
            _, nodes, packed, _ = wire.read_frame(3)
            link.answer(nodes, packed)
        except (wire.Broken, OSError):
            os._exit(0)
