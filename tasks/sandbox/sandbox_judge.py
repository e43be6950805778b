"""The judge's process: it runs the test, and never a line of the program's text.

It runs the part of the task's prompt that comes before the function to write (its imports and
helper functions belong to the task), then the test. The names that the test takes from the program
stand for calls to the program's process (`sandbox_link.py`), and what comes back is plain data of
exact types (`sandbox_codec.py`). So the program can replace builtins, modules and helper functions
for itself only, and it holds neither the channel of the verdict nor the test's text.

An object that is no plain data arrives as a `Remote`. It passes on only operations that tell the
program nothing of what the test expects: calls, attributes, items, length, truth. `==`, `in`
and arithmetic are not passed on, so no object can claim to equal the right answer.

Where the test itself needs what cannot cross (it passes an object of a class of its own, or looks
at the function instead of calling it), the verdict is "together": the server then judges in one
process. Only what the test does leads there; what the program returns never does.
"""

import contextlib
import functools
import os
import pickle
import sys
import types

import sandbox_child as child
import sandbox_codec as codec
import sandbox_link as wire
import sandbox_random as randomness
from sandbox_hook import audit_hook

NOWHERE = "/nonexistent"
VERDICT = 4  # the descriptor of the server's channel; 3 is the program's
# What a test may pass to a program as something to call back.
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
)
# What a test, and inspect, read of a function. Other libraries (numpy) look for other names in any
# object that they are given, so a program could choose its judge by those.
OF_FUNCTIONS = frozenset(
    [
        "__annotations__",
        "__closure__",
        "__code__",
        "__defaults__",
        "__kwdefaults__",
        "__name__",
        "__qualname__",
        "__signature__",
        "__wrapped__",
    ]
)


class Remote:
    """Stands for an object of the program's that is no plain data."""

    __slots__ = ("_link", "_named")

    def __init__(self, link, named):
        """`named`: whether the test knows it by its name, as it does the function to judge."""
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_named", named)

    def __reduce_ex__(self, protocol) -> "tuple":
        return self._link.leave("failed", "the test copies an object of the program's")

    def __getattr__(self, name):
        if name.startswith("_"):
            if self._named and name in OF_FUNCTIONS and not self._link.executes:
                self._link.leave("together", f"the test reads {name} of the program's function")
            raise AttributeError(f"the program's object does not show {name}")
        value = self._link.ask("get", self, name)
        if self._link.executes and isinstance(value, Remote):
            object.__setattr__(
                value, "_named", False
            )  # a method, even if it claims to be its owner
        return value

    def __setattr__(self, name, value):
        self._link.ask("set", self, name, value)

    def __getitem__(self, key):
        return self._link.ask("item", self, key)

    def __iter__(self):
        return self._link.ask("iter", self)

    def __next__(self):
        return self._link.ask("next", self)

    def __len__(self):
        return self._link.ask("len", self)

    def __bool__(self):
        return self._link.ask("bool", self)


class RemoteFunction(Remote):
    """Stands for a function or a class of the program's."""

    __slots__ = ()

    def __call__(self, *args, **kwargs):
        """The function's value for these arguments, from the program's process."""
        if self._link.executes and (args or kwargs) and not self._named:
            # `result.equals(answer)` would let the program's object judge itself.
            self._link.leave("failed", "the test passes a value to an object of the program's")
        return self._link.ask("call", self, *args, **kwargs)


class JudgeLink(wire.Link):
    """The judge's end: strict in what it sends, exact in what it takes."""

    _strict = True

    def __init__(self, descriptor, executes):
        """`executes`: whether the test runs the program itself, by `exec`."""
        super().__init__(descriptor)
        self.executes = executes
        self._named = False
        self.refusals = []

    def names(self, wanted):
        """What the program has under these names; those that it lacks are left out."""
        self._named = True
        found = self.ask("names", None, *wanted)
        self._named = False
        if type(found) is not dict:
            self.leave("failed", "the program's process sent what is no plain data")
        return {name: found[name] for name in wanted if name in found}

    def _exchange(self, request):
        what, value = super()._exchange(request)
        if what == "refused":
            self.refusals.append(value)
        return what, value

    def _lost(self, error):
        if isinstance(error, codec.CannotCross):
            self.leave("together", str(error))
        if isinstance(error, (wire.Ended, OSError)):
            self.leave("died", "the program's process ended during a call")
        self.leave("failed", "the program's process sent what is no plain data")

    def leave(self, outcome, detail):
        """Sends the verdict and ends the process."""
        with contextlib.suppress(OSError):
            wire.write_frame(VERDICT, {"outcome": outcome, "detail": detail[: child.DETAIL_BYTES]})
        os._exit(0)

    def _handle(self, value):
        known = self._known(value)
        if known is not None:
            return known
        if isinstance(value, FUNCTIONS) or hasattr(type(value), "__next__"):
            return self._any_handle(value)
        if self.executes:
            with contextlib.suppress(Exception):  # there is no list of what pickling may raise
                return ["pickle", pickle.dumps(value).hex()]
        raise codec.CannotCross(f"the test passes an object of {type(value).__name__}")

    def execute(self, own, wanted, code, names=None):
        """Stands for `exec` in a test: the program's process runs the code.

        Args:
            own: the test's variables, in which no program runs.
            wanted: the variables that the test looks at afterwards.
            code: the program's text.
            names: the variables of the code, as a dict.
        """
        if type(code) is not str or type(names) is not dict or names is own:
            self.leave("together", "the test calls exec in a way that needs its own process")
        self.ask("exec", None, code, names, randomness.states())
        names.update(self.names(wanted))

    def _make(self, number, kind):
        return (RemoteFunction if kind == "function" else Remote)(self, self._named)

    def _try(self, operation, target, args, kwargs):
        """Calls a function that the test has passed to the program; nothing else is on offer."""
        done = {"call": target, "next": getattr(type(target), "__next__", None)}.get(operation)
        if (self._known(target) or ["none"])[0] != "mine" or done is None:
            self.leave("failed", "the program's process asked for what the test did not pass")
        try:
            return "value", done(*args, **kwargs) if operation == "call" else done(target)
        except BaseException as error:
            return "error", error


def run_judge(harness, config, link, verdict, limit_s):
    """Runs in the judge's process from the fork to its end; never returns.

    The server does not read the test, because the program's process is a fork of the server.

    Args:
        harness: the descriptor from which the prelude, the test, and the names that the test takes
            from the program are read.
        config: the server's settings.
        link: the descriptor of the program's process.
        verdict: the descriptor for the verdict.
        limit_s: the time limit, which the server keeps.
    """
    try:
        job = wire.read_frame(harness)
        os.write(verdict, b".")
        child.enter_child(config, limit_s, [link, verdict])
        sys.modules["__main__"] = types.ModuleType("__main__")
        # Libraries keep caches there, some as pickles; the program could write them.
        os.environ.update(HOME=NOWHERE, MPLCONFIGDIR=NOWHERE)
        if config["fence"] is not None:
            sys.addaudithook(audit_hook(True, config["fence"]))
        link = JudgeLink(3, job["executes"])
    except BaseException:
        os._exit(1)
    try:
        judge(link, job)
    except BaseException as error:
        known = {id(refusal) for refusal in link.refusals}
        refused = any(id(part) in known for part in child.chain(error))
        # A test that makes its own data may need what the sandbox refuses, the network for one.
        refused = refused or (link.executes and child.is_refusal(error))
        text = child.describe(error)[1:].decode("utf-8", "replace").strip()
        link.leave("refused" if refused else "failed", text)
    link.leave("passed", "")


def judge(link, job):
    """Runs the prelude and the test.

    Raises:
        BaseException: the program is wrong.
    """
    names: dict = {"__name__": "test"}
    if job["executes"]:
        names["exec"] = functools.partial(link.execute, names, job["names"])
        exec(compile(job["test"], "<test>", "exec"), names)
        return
    try:
        exec(compile(job["prelude"], "<prompt>", "exec"), names)
    except BaseException as error:
        link.leave("together", f"the prompt does not run by itself: {type(error).__name__}")
    wanted = [name for name in job["names"] if name not in names or name in job["entry_points"]]
    names.update(link.names(wanted))
    exec(compile(job["test"], "<test>", "exec"), names)
