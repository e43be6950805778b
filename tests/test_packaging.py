"""pyproject.toml declares what the code imports, and constraints.txt pins all of it."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("proxytune", "tasks", "scripts", "hydra_plugins", "tests")

# Imported, but declared only by the package that always brings it: its versions are that one's.
BROUGHT = {
    "huggingface-hub": "transformers",
    "markupsafe": "jinja2",
    "packaging": "transformers",
    "pyyaml": "transformers",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "tqdm": "transformers",
    "omegaconf": "hydra-core",
    "starlette": "fastapi",
    "requests": "schemathesis",
}

# Declared, but imported by others.
NOT_IMPORTED = {
    "bitsandbytes",  # transformers, for quantised weights
    "hydra-submitit-launcher",  # in hydra_plugins, whose name it shares with a folder of ours
    "setuptools",  # alpaca-eval, for pkg_resources
    "pytest-timeout",
    "pytest-xdist",
    "pyright",
    "ruff",
}


def declared() -> dict[str, list[Requirement]]:
    """Extra -> its requirements; the core's stand under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(each) for each in group] for extra, group in groups.items()}


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements} - {"proxytune"}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    by_name = {canonicalize_name(each.name): each for each in found}
    assert len(by_name) == len(found), "a package is pinned twice"
    return by_name


def imports(path: Path) -> Iterator[str]:
    """The top-level names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def importers() -> dict[str, set[str]]:
    """Distribution -> our files that import it."""
    files = [ROOT / "run.py", *(path for each in FOLDERS for path in (ROOT / each).rglob("*.py"))]
    neighbours = {path.stem for path in files}  # scripts import each other under the bare name
    owners = metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in files:
        for name in set(imports(path)) - set(FOLDERS) - set(sys.stdlib_module_names):
            for owner in owners.get(name, [] if name in neighbours else [name]):
                file = path.relative_to(ROOT).as_posix()
                found.setdefault(canonicalize_name(owner), set()).add(file)
    return found


def closure(name: str, extras: Iterable[str] = ()) -> set[str]:
    """The installed distributions that one needs, itself included."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while todo:
        if (each := todo.pop()) in seen:
            continue
        seen.add(each)
        for line in metadata.requires(each[0]) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": each[1]}):
                todo += [(canonicalize_name(needed.name), extra) for extra in ("", *needed.extras)]
    return {name for name, _ in seen}


@pytest.mark.slow
def test_every_import_is_declared():
    groups = declared()
    tools = names(groups["dev"])
    product = set[str]().union(*(names(each) for extra, each in groups.items() if extra != "dev"))
    undeclared = {}
    for name, files in importers().items():
        allowed = BROUGHT.get(name, name) in product
        if not allowed and BROUGHT.get(name, name) in tools:
            allowed = not any(file.startswith(("proxytune/", "tasks/", "hydra")) for file in files)
        if not allowed:
            undeclared[name] = sorted(files)
    assert not undeclared


@pytest.mark.slow
def test_every_declared_package_is_imported():
    everything = set[str]().union(*map(names, declared().values()))
    assert everything - set(importers()) == NOT_IMPORTED


@pytest.mark.slow
def test_what_is_said_to_be_brought_is():
    imported = importers()
    for name, bringer in BROUGHT.items():
        needs = map(Requirement, metadata.requires(bringer) or [])
        assert name in names(each for each in needs if each.marker is None)
        assert name in imported


def test_an_extra_asks_for_the_range_that_the_others_ask_for():
    ranges: dict[str, set[str]] = {}
    for requirement in (each for group in declared().values() for each in group):
        if requirement.specifier:
            name = canonicalize_name(requirement.name)
            ranges.setdefault(name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_all_and_dev_hold_every_extra():
    groups = declared()
    held = next(each for each in groups["all"] if each.name == "proxytune").extras
    assert held == set(groups) - {"", "all", "dev", "math", "quantization", "ray", "slurm", "vllm"}
    assert "all" in next(each for each in groups["dev"] if each.name == "proxytune").extras


def test_the_lock_pins_versions_that_pyproject_allows():
    locked = pins()
    for name, pin in locked.items():
        assert pin.url is None and [each.operator for each in pin.specifier] == ["=="], name
    groups = {extra: group for extra, group in declared().items() if extra != "vllm"}  # not locked
    for requirement in (each for group in groups.values() for each in group):
        name = canonicalize_name(requirement.name)
        if name != "proxytune":
            version = next(iter(locked[name].specifier)).version
            assert requirement.specifier.contains(version, prereleases=True), name


def test_what_is_installed_is_what_the_lock_says():
    if not (Path(sys.prefix) / "installed").exists():
        pytest.skip("`make install` did not make this environment, so it need not be the lock's")
    locked = pins()
    # a build tag, as in 2.13.0+cpu, does not count in ==
    differing = {
        name: f"{version} is installed, {locked.get(name, 'nothing')} is locked"
        for name in closure("proxytune", ["dev"]) - {"proxytune"}
        if (version := metadata.version(name))
        and (name not in locked or not locked[name].specifier.contains(version, prereleases=True))
    }
    assert not differing


def run_with(extra: str, code: str) -> str:
    """What a program prints where the core and one extra are installed, and nothing else is."""
    there = closure("proxytune", [extra])
    # a module of None is one that cannot be found, as if its package were not installed
    hidden = [
        name
        for name, owners in metadata.packages_distributions().items()
        if there.isdisjoint(map(canonicalize_name, owners)) and name not in FOLDERS
    ]
    assert len(hidden) > 10
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_core_alone_loads_and_generates():
    code = """
import proxytune
members = (f"pocket/models/{name}" for name in ("base", "expert", "antiexpert"))
generator = proxytune.load(*members, device="cpu")
print(generator.generate(["Question: "], max_new_tokens=4)[0].finish_reason)
"""
    assert run_with("", code) in ("length", "eos")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("alpaca_eval", "tasks.alpaca_judge"),
        ("api", "proxytune.members.api.member"),
        (
            "experiments",
            "proxytune.cli.composed, proxytune.experiment.runner, proxytune.results.report",
        ),
        ("experiments", "proxytune.harness.evaluation, proxytune.harness.model"),
        ("serve", "proxytune.server.app, proxytune.cli.composed, proxytune.cli.serve"),
        ("track", "proxytune.experiment.tracking, wandb, wandb_workspaces"),
        ("train", "proxytune.training.train"),
    ],
)
def test_an_extra_brings_what_its_modules_import(extra, modules):
    assert run_with(extra, f"import {modules}; print('fine')").endswith("fine")
