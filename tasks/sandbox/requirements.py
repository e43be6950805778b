"""What a test needs to be judged apart from the program, read from the task's own texts."""

import ast
import builtins
import functools
import re
import symtable
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tasks.sandbox.sandbox import Program

# Python 3.11 counts the depth of all syntax trees that are being made together; a thread that makes
# one beside another fails with a SystemError (python/cpython#106905). The sandbox has a thread for
# each worker.
_ONE_TREE = threading.Lock()

# A test that uses one of these looks at, or changes, the state of the process that it runs in, or
# looks at a function instead of calling it.
SHARED_STATE = frozenset(
    [
        "CoroutineType", "GeneratorType", "argv", "asyncio", "caplog", "capsys", "catch_warnings",
        "chdir", "environ", "globals", "inspect", "logging", "mock", "monkeypatch", "patch",
        "redirect_stderr", "redirect_stdout", "seed", "setrecursionlimit", "stderr", "stdin",
        "stdout", "tracemalloc", "update_wrapper", "vars", "warns", "wraps",
    ]
)  # fmt: skip


# What a namedtuple shows under names that begin with an underscore.
PUBLIC = frozenset(["_asdict", "_fields", "_make", "_replace"])
# Statements that only the program's own objects can take part in.
OWN_STATEMENTS = (ast.AsyncFor, ast.AsyncFunctionDef, ast.AsyncWith, ast.Await, ast.ClassDef)


# The same for a test that runs the program by `exec`: what it sets up before goes along with the
# text, but what the program leaves in its process (its output, its figures) does not come back.
SHARED_BY_EXEC = frozenset(
    ["gca", "gcf", "get_fignums", "redirect_stderr", "redirect_stdout", "stderr", "stdin", "stdout"]
)
# Names by which such a test would run the program's text in its own process, or its pickles.
OTHER_EXEC = frozenset(
    [
        "__import__", "builtins", "compile", "dill", "eval", "importlib", "joblib", "locals",
        "pickle", "read_pickle", "runpy", "subprocess",
    ]
)  # fmt: skip


class Requirements(NamedTuple):
    """What the judge's process needs.

    Attributes:
        prelude: the prompt's text before the function to write.
        names: what the test takes from outside: the prompt or the program. If the test runs the
            program itself, the variables that it looks at afterwards.
        entry_points: those of them that come from the program even if the prompt has them: the one
            that the program names, else those in the test's last statement, `check(f)`.
        imports: the imports of the test, which the program sees, too.
        executes: whether the test runs the program itself, by `exec`.
    """

    prelude: str
    names: list[str]
    entry_points: list[str]
    imports: str
    executes: bool = False


def requirements(program: "Program") -> Requirements | None:
    """What the judge needs; None if the program must be judged in its own process.

    That is so without a test, where the caller wants it, and if the test shares state with the
    program, defines classes for it, or needs its classes. It depends on the task only, never on the
    program.
    """
    if program.together or not program.test:
        return None
    if program.executes:
        return _read_executing(program.test)
    found = _read(program.test)
    if found is None:
        return None
    names, imports, last = found
    entry = program.entry_point
    prelude = _prelude(program.prompt, entry)
    if entry is not None:
        return Requirements(prelude, sorted({*names, entry}), [entry], imports)
    return Requirements(prelude, names, last, imports)


@functools.cache
def _prelude(prompt: str, entry_point: str | None) -> str:
    """The prompt up to the definition of the entry point; all of it without one."""
    if entry_point is None:
        return prompt
    places = re.finditer(rf"^(async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: max((place.start() for place in places), default=len(prompt))]


@functools.cache
def _read(test: str) -> tuple[list[str], str, list[str]] | None:
    """What a test takes from outside, its imports, and what of it is in its last statement.

    Returns: None if the test cannot be apart.
    """
    try:
        with _ONE_TREE:
            tree = ast.parse(test)
        names = sorted(_outside_names(test))
    except (SyntaxError, ValueError, RecursionError):
        return None
    if SHARED_STATE & set(_words(tree)) or _needs_classes(tree):
        return None
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    last = sorted(set(names) & set(_words(tree.body[-1]))) if tree.body else []
    return names, "\n".join(map(ast.unparse, imports)), last


def _needs_classes(tree: ast.Module) -> bool:
    """Whether a test needs more of the program's objects than `sandbox_judge.py` passes on.

    That is: their classes (`except Mine`, `type(x) is Mine`), their private attributes, what only
    the interpreter may do with them (`with`, `await`), or a change to a module that they use.
    """
    modules = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    known = modules | vars(builtins).keys() | {"None"}
    known |= {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _root(node.value) in known
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        of_classes: list[ast.expr] = []
        if isinstance(node, OWN_STATEMENTS):
            return True
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and node.attr not in PUBLIC
            if private or (isinstance(node.ctx, ast.Store) and _root(node) in modules):
                return True
        elif isinstance(node, ast.With):
            of_classes = [item.context_expr for item in node.items]
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            of_classes = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and node.args:
            if getattr(node.func, "attr", "") in ("raises", "assertRaises", "assertRaisesRegex"):
                of_classes = node.args[:1]
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Call):
            of_classes = node.comparators if _root(node.left.func) == "type" else []
        if not all(_root(part) in known for part in of_classes):
            return True
    return False


def _root(node: ast.AST) -> str:
    """The variable from which an expression starts, `a` in `a.b(c)[d]`; "None" without one."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else "None"


@functools.cache
def _read_executing(test: str) -> Requirements | None:
    """What the judge needs for a test that runs the program; None if the test cannot be apart."""
    try:
        with _ONE_TREE:
            tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError):
        return None
    if SHARED_BY_EXEC & set(_words(tree)) or OTHER_EXEC & set(_names(tree)):
        return None
    looked_at = set()
    for part in ast.walk(tree):
        keys = [part.slice] if isinstance(part, ast.Subscript) else []
        keys += part.args if isinstance(part, ast.Call) else []
        looked_at |= {k.value for k in keys if isinstance(k, ast.Constant)}
    wanted = sorted(n for n in looked_at if isinstance(n, str) and n.isidentifier())
    return Requirements("", wanted, [], "", executes=True)


def _names(tree: ast.AST) -> Iterator[str]:
    """The variables that a test reads and the modules that it imports; attributes are none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.alias):
            yield node.name.partition(".")[0]
        elif isinstance(node, ast.Attribute) and node.attr == "read_pickle":
            yield node.attr


def _words(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def _outside_names(test: str) -> set[str]:
    """The names that a test reads and neither defines nor finds in the builtins."""
    used: set[str] = set()
    bound: set[str] = set()
    todo = [symtable.symtable(test, "<test>", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        for symbol in table.get_symbols():
            top = table.get_type() == "module"
            if symbol.is_referenced() and (top or symbol.is_global()):
                used.add(symbol.get_name())
            if (top or symbol.is_declared_global()) and (
                symbol.is_assigned() or symbol.is_imported()
            ):
                bound.add(symbol.get_name())
    return used - bound - vars(builtins).keys()
