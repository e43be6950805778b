"""The floors of the house: every import runs down, and there is no circle."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down. Rooms on one floor may import each other, but not in a circle.
FLOORS = (
    ("harness", "cli"),
    ("experiment", "training"),
    ("config",),
    ("server",),
    ("api", "vllm"),
    ("generator", "provenance"),
    ("loading", "proxy", "formula"),
    ("members", "results", "single"),
    ("engine",),
    ("records", "files", "roles", "loopback", "errors", "secrets", "hashes", "terminal", "shapes"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """proxytune/engine/loop.py -> proxytune.engine.loop."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted((ROOT / "proxytune").rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, also inside of functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in whole}
    return {name for name in found if name in modules()}


def room(module: str) -> str:
    """proxytune.engine.loop -> engine."""
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    rooms = {room(module) for module in modules()} - {""}
    assert rooms == FLOOR_OF.keys()


@pytest.mark.parametrize("module", modules())
def test_imports_run_down(module):
    if not room(module):
        return  # proxytune/__init__.py names the API, and imports it on first use
    own = FLOOR_OF[room(module)]
    upward = {m for m in imported(modules()[module]) if room(m) and FLOOR_OF[room(m)] < own}
    assert not upward, f"{module} imports from a higher floor"


def test_there_is_no_circle():
    reached: dict[str, set[str]] = {}

    def below(module: str, path: tuple[str, ...] = ()) -> set[str]:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in reached:
            theirs = imported(modules()[module]) - {"proxytune", module}
            further = [below(each, (*path, module)) for each in theirs]
            reached[module] = theirs.union(*further)
        return reached[module]

    for module in modules():
        if module != "proxytune":
            below(module)


@pytest.mark.parametrize("package", ["tasks", "scripts", "hydra_plugins"])
def test_the_library_knows_nothing_of_who_uses_it(package):
    users = [path for path in modules().values() if f"import {package}" in path.read_text()]
    users += [path for path in modules().values() if f"from {package}" in path.read_text()]
    assert not users


# What `import proxytune`, load, generate, logits and loglikelihood may import.
LIGHT = {"proxytune", "torch", "transformers", "numpy"}


def test_the_core_imports_torch_transformers_and_numpy_alone():
    rooms = ("engine", "members", "loading", "proxy", "formula", "single", "api", "generator")
    core = [m for m in modules() if room(m) in (*rooms, *FLOORS[-1])]
    heavy = {}
    for module in core:
        if module.startswith("proxytune.members.api."):
            continue  # imported only for a base behind an API
        for node in ast.parse(modules()[module].read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names}:
                if top and top not in LIGHT | set(sys.stdlib_module_names):
                    heavy[module] = top
    assert not heavy


def test_importing_the_command_line_does_not_import_torch():
    heavy = "sorted({'torch', 'transformers'} & set(sys.modules))"
    code = f"import proxytune.cli.composed, sys; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in modules().values()} - {ROOT / "proxytune"})
)
def test_a_package_says_what_each_of_its_files_is_for(folder):
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^(\w+\.py) ", said, re.M))
    assert len(re.findall(r"^\w+\.py ", said, re.M)) == len(files), "a file is named twice"
