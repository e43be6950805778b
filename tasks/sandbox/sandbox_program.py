"""The process of a program whose judge is another process (`sandbox_judge.py`).

It runs the program, tells the server when it has reached its end, and then does what the judge asks
for. It has never held the test, and nothing that it says counts but the values that it returns; so
the program may do in it what it likes, within the walls.
"""

import ast
import copy
import operator
import os
import pickle
import sys
import types

import sandbox_child as child
import sandbox_link as wire
import sandbox_plain as plain
import sandbox_random as randomness
from sandbox_hook import audit_hook

PROGRAM = "program"  # the name of its module: it runs as if imported


OPERATORS = (
    "abs", "add", "contains", "delitem", "eq", "floordiv", "ge", "getitem", "gt", "index", "invert",
    "le", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg", "pos", "pow", "rshift", "setitem",
    "sub", "truediv", "xor",
)  # fmt: skip
BUILTINS = (
    bool, complex, float, format, hash, int, iter, len, next, repr, reversed, round, str
)  # fmt: skip


class ProgramLink(wire.Link):
    """The program's end: it does what the judge asks for."""

    def __init__(self, descriptor, names):
        super().__init__(descriptor)
        self._names = names
        self._operations = {
            "call": self._call,
            "exec": self._exec,
            "names": self._find,
            "get": getattr,
            "set": setattr,
            "isinstance": lambda kind, value: isinstance(value, kind),
            "issubclass": lambda kind, other: issubclass(other, kind),
            "and": operator.and_,
            "or": operator.or_,
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            **{name: getattr(operator, name) for name in OPERATORS},
            **{kind.__name__: kind for kind in BUILTINS},
        }

    def _call(self, target, *args, **kwargs):
        value = target(*args, **kwargs)
        if isinstance(target, type) and plain.is_own_container(value):
            # What a test makes by calling a class, it uses as that class's object, methods and all.
            self._any_handle(value)
        return value

    def _try(self, operation, target, args, kwargs):
        try:
            return "value", self._operations[operation](target, *args, **kwargs)
        except BaseException as error:
            return "refused" if child.is_refusal(error) else "error", error

    def _find(self, _, *wanted):
        return {name: self._names[name] for name in wanted if name in self._names}

    def _exec(self, _, code, names, states):
        """Runs what the test wants executed; `names` then answers from its variables."""
        randomness.restore(states)
        self._names = dict(names)
        exec(code, self._names)

    def _stand_in(self, node):
        if node[0] == "pickle":  # the judge's own object
            return pickle.loads(bytes.fromhex(node[1]))
        return super()._stand_in(node)

    def _lost(self, error):
        if not isinstance(error, wire.TooLong):
            os._exit(0)

    def _make(self, number, kind, operations):
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
        child.enter_child(config, job["limit_s"], [channel])
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
        os.write(3, child.describe(error, child.is_refusal(error)))
        os._exit(0)
    link = ProgramLink(3, names)
    os.write(3, b".")
    while True:
        try:
            _, nodes, packed, _ = wire.read_frame(3)
            link.answer(nodes, packed)
        except (wire.Broken, OSError):
            os._exit(0)
