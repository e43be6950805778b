"""Judge and program in one process, for tests that need it, and how the program proves its end.

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

import builtins
import functools
import gc
import operator
import os
import signal
import sys

import sandbox_child as child
import sandbox_hook as hook

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
    raise SystemError("a thread or a gc callback of the program is still there")
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


def run_together(job, config, channel):
    """Runs program and test in this process from the fork to its end; never returns.

    Through its callers' frames, the program can reach only this function's variables, because the
    module's names are cleared before it runs.
    """
    leave, write, tell, run = os._exit, functools.partial(os.write, 3), child.describe, _run
    first, is_refused = operator.itemgetter(0), child.is_refusal
    try:
        nonces = [draw_nonce(job, config, channel)]
        take_nonce = nonces.pop
        testing = []
        sys.addaudithook(hook.audit_hook(config["native"], config["fence"], testing))
        take = stages(job["code"], job["test"], testing).pop
        if not config["native"]:
            for name in hook.NATIVE_MODULES & sys.modules.keys():
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
    child.enter_child(config, job["limit_s"], [channel])
    nonce = os.urandom(child.NONCE_BYTES)
    os.write(3, nonce)
    os.read(3, 1)  # the server has the nonce, so the program cannot read it back
    return nonce
