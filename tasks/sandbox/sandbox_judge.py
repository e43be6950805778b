"""The judge's process: it runs the test, and never a line of the program's text.

It runs the part of the task's prompt that comes before the function to write (its imports and
helper functions belong to the task), then the test. The names that the test takes from the program
stand for calls to the program's process (`sandbox_link.py`), and what comes back is plain data of
exact types (`sandbox_codec.py`). So the program can replace builtins, modules and helper functions
for itself only, and it holds neither the channel of the verdict nor the test's text.

An object that is no plain data arrives as a `Remote`. It passes on only operations that tell the
program nothing of what the test expects: calls, attributes, items, length, truth, text, and
comparisons and arithmetic with another object of the program's. `==`, `in` and arithmetic with a
value of the test's are not passed on, so no object can claim to equal the right answer. A test that
fails after one of these, of an object that has it, says "refused": it may have been right.

Where the test itself needs what cannot cross (it passes an object of a class of its own, or looks
at the function instead of calling it), the verdict is "together": the server then judges in one
process. Only what the test does leads there; what the program returns never does.
"""

import contextlib
import functools
import operator
import os
import pickle
import sys
import types

import sandbox_child as child
import sandbox_codec as codec
import sandbox_link as wire
import sandbox_random as randomness
from sandbox_hook import audit_hook

# Operations on one object of the program's; Python calls them by methods (__abs__ and so on).
UNARY = (
    "abs", "bool", "complex", "copy", "delitem", "float", "format", "getitem", "hash", "index",
    "int", "invert", "iter", "len", "neg", "next", "pos", "repr", "reversed", "round", "setitem",
    "str",
)  # fmt: skip
WITHHELD = "the test compares a value of its own with an object of the program's"
NOWHERE = "/nonexistent"
VERDICT = 4  # the descriptor of the server's channel; 3 is the program's
# What a test may pass to a program as something to call back.
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    functools.partial,
    operator.attrgetter,
    operator.itemgetter,
    operator.methodcaller,
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

    __slots__ = ("_link", "_named", "_operations")

    def __init__(self, link, named, operations):
        """Makes one for an object of which the program's process has told.

        Args:
            link: the connection to the program's process.
            named: whether the test knows it by its name, as it does the function to judge.
            operations: those of `sandbox_link.OPERATIONS` that the object has.
        """
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_named", named)
        object.__setattr__(self, "_operations", operations)

    def __reduce_ex__(self, protocol) -> "tuple":
        return self._link.leave("failed", "the test pickles an object of the program's")

    def __deepcopy__(self, memo):
        return self._link.ask("deepcopy", self)

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

    def __contains__(self, item):
        if isinstance(item, Remote):
            return self._link.ask("contains", self, item)
        self._withhold("contains")
        parts = self._link.ask("iter", self)
        return any(part is item or part == item for part in parts)

    def _withhold(self, operation):
        self._link.withheld |= operation in self._operations

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and bool(self._link.ask("isinstance", self, value))

    def __subclasscheck__(self, kind):
        return isinstance(kind, Remote) and bool(self._link.ask("issubclass", self, kind))


def _unary(operation):
    def method(self, *args):
        return self._link.ask(operation, self, *args)

    return method


def _binary(operation):
    def method(self, other):
        if isinstance(other, Remote) and operation in wire.BINARY:
            return self._link.ask(operation, self, other)
        self._withhold(operation)
        return NotImplemented

    return method


for _operation in UNARY:
    setattr(Remote, f"__{_operation}__", _unary(_operation))
for _operation in (*wire.BINARY, *wire.REFLECTED):
    setattr(Remote, f"__{_operation}__", _binary(_operation))


class RemoteFunction(Remote):
    """Stands for a function or a class of the program's."""

    __slots__ = ()

    def __call__(self, *args, **kwargs):
        """The function's value for these arguments, from the program's process."""
        if self._link.executes and (args or kwargs) and not self._named:
            # `result.equals(answer)` would let the program's object judge itself.
            self._link.leave("failed", "the test passes a value to an object of the program's")
        try:
            return self._link.ask("call", self, *args, **kwargs)
        except StopIteration as error:
            if self._link.stops:
                raise
            # It would end `map(f, inputs)` in the test before anything is compared.
            raise RuntimeError("the program's function raised StopIteration") from error


class JudgeLink(wire.Link):
    """The judge's end: strict in what it sends, exact in what it takes."""

    _strict = True

    def __init__(self, descriptor, executes, stops):
        """Takes the connection to the program's process.

        Args:
            descriptor: an open stream socket.
            executes: whether the test runs the program itself, by `exec`.
            stops: whether the test knows of StopIteration as the outcome of a call.
        """
        super().__init__(descriptor)
        self.executes, self.stops = executes, stops
        self._named = False
        self._got_tables = False
        self.refusals, self.withheld = [], False

    @property
    def _exact(self):
        """Whether tables go out exactly or not at all.

        Once the program has sent some, all go out as plain data: what cannot go back would let it
        choose one process.
        """
        return self.executes or not self._got_tables

    def _unpack(self, nodes, known):
        self._got_tables |= any(node[0] in codec.data.TABLES for node in nodes)
        return super()._unpack(nodes, known)

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
        if isinstance(error, wire.TooLong):
            self.leave("refused", str(error))
        if isinstance(error, codec.data.Masked):
            self.leave("refused", str(error))
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
        kind = type(value)
        # Files have __next__, too; their other methods are missed on the other side.
        iterates = hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools")
        if isinstance(value, FUNCTIONS) or iterates:
            return self._any_handle(value)
        if self.executes:
            with contextlib.suppress(Exception):  # there is no list of what pickling may raise
                return ["pickle", pickle.dumps(value).hex()]
        if self._got_tables and codec.data.is_of_tables(kind):
            # The program may have sent it, and would choose its judge by that.
            self.leave("failed", f"the test passes back an object of {kind.__name__}")
        raise codec.CannotCross(f"the test passes an object of {kind.__name__}")

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

    def _make(self, number, kind, operations):
        return (RemoteFunction if kind == "function" else Remote)(self, self._named, operations)

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
        codec.data.allow_masked("mask" in job["test"])
        link = JudgeLink(3, job["executes"], "StopIteration" in job["test"])
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
        if link.withheld and not refused:
            text = f"{WITHHELD}: {text}"
        link.leave("refused" if refused or link.withheld else "failed", text)
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
