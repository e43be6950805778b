"""What can be done with a snippet of a document: run it, compose it, start what it starts."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from proxytune.config import given
from proxytune.files import ROOT
from proxytune.harness.arguments import alphas_of, formula_of, specs_of
from proxytune.loading.formulas import needs_of
from tests.commands import call
from tests.documents import SNIPPETS, Snippet

SERVE = ["proxytune", "serve", "triple=pocket"]


@dataclass
class Place:
    """A folder in which the repository's files seem to lie, and what a command needs there.

    Attributes:
        swaps: printed -> local; `local` says what the names in braces stand for.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest
    said: pytest.CaptureFixture[str]
    swaps: dict[str, str]

    def local(self, text: str) -> str:
        """The text with everything exchanged that is not on this machine."""
        for printed, ours in self.swaps.items():
            text = text.replace(printed, ours)
        text = text.replace("{tmp}", str(self.folder))
        for fixture in ("server", "judge"):
            if f"{{{fixture}}}" in text:
                url = self.request.getfixturevalue(fixture)
                text = text.replace(f"{{{fixture}}}", url)
        return text

    def words(self, snippet: Snippet, more: str = "") -> list[str]:
        """The local command; variables before it are set."""
        words = shlex.split(self.local(f"{snippet.text} {more}"))
        while re.match("[A-Z_]+=", words[0]):
            self.patch.setenv(*words.pop(0).split("=", 1))
        return words


# -- what can be done with a snippet --------------------


def run(snippet: Snippet, more: str, place: Place) -> None:
    """Runs a Python command in this process, which has imported torch already."""
    program, *words = place.words(snippet, more)
    assert program == "python"
    place.patch.setattr(sys, "argv", words)
    place.patch.setenv("HYDRA_FULL_ERROR", "")  # the commands set it; put back afterwards
    place.patch.setattr(time, "perf_counter", time.perf_counter)  # bench.py may exchange it
    place.patch.syspath_prepend(str(ROOT / Path(words[0]).parent))
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        assert not end.code, place.said.readouterr().err[-2000:]
    finally:
        torch.set_num_threads(threads)
    if "output_dir={tmp}/run" in more:
        assert list((place.folder / "run").rglob("table.md")), "the run shows no table"


def run_check(snippet: Snippet, more: str, place: Place) -> None:
    """Runs `proxytune check` in this process; it ends in a verdict."""
    from proxytune import cli

    program, *words = place.words(snippet, more)
    assert program.endswith("proxytune")
    done = call(cli.main, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(("helps", "hurts", "cannot tell"))


def run_outside(snippet: Snippet, more: str, place: Place) -> None:
    """Runs a command in a process of its own; it has to succeed, and our scripts to be quiet."""
    words = place.words(snippet, more)
    if words[0].endswith(".py") or words[0] == "python":
        words = [sys.executable, *words[words[0] == "python" :]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def composes(snippet: Snippet, more: str, place: Place) -> None:
    """Composes the configuration that a command, or settings in the text, ask for."""
    name, *given = more.split() or ["config"]
    words = [w for w in shlex.split(snippet.text) if "=" in w and not re.match("-|[A-Z_]+=", w)]
    prefix = "task.lm_eval_arc_easy" if words[0].startswith(".") else ""
    words = [f"{prefix}{word.replace('{...}', '{a: 1}').replace('...', '1')}" for word in words]
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():  # its first point
            first = next(iter(override.sweep_string_iterator()))
            words[words.index(override.input_line or "")] = f"{override.get_key_element()}={first}"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, [*given, *words])
    OmegaConf.to_container(cfg, resolve=True)


def make_prints(snippet: Snippet, more: str, place: Place) -> None:
    """`make -n`: the target and its variables exist, and so do the scripts that it starts."""
    text = snippet.text if snippet.kind == "command" else f"make table4 {snippet.text}"
    done = subprocess.run([*shlex.split(text), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout
    for script in re.findall(r"\bscripts/\S+\.py", done.stdout):
        assert (ROOT / script).is_file()
    for value in re.findall(r" (?:SIZE|ARGS|NUM_GPUS)=(\S+)", text):
        assert value in done.stdout, f"{value} goes nowhere"


def rescored(snippet: Snippet, more: str, place: Place) -> None:
    """Runs a command on the files that the command printed before it has written."""
    before = SNIPPETS[SNIPPETS.index(snippet) - 1]
    run(before, more, place)
    run(snippet, more, place)
    assert list((place.folder / "check").rglob("table2.md"))


def python_block(snippet: Snippet, more: str, place: Place) -> None:
    """Runs a snippet; where the document shows what it prints, that has to come out."""
    exec(compile(place.local(snippet.text), snippet.document, "exec"), {"__name__": "snippet"})
    said = place.said.readouterr().out
    assert said.strip() == snippet.output if snippet.output else said


def capitals_module(snippet: Snippet, more: str, place: Place) -> None:
    """Makes tasks/capitals.py of docs/own.md importable."""
    module = types.ModuleType("tasks.capitals")
    place.patch.setitem(sys.modules, "tasks.capitals", module)
    exec(compile(snippet.text, "tasks/capitals.py", "exec"), module.__dict__)


def capitals(snippet: Snippet, more: str, place: Place) -> None:
    """Runs the task of docs/own.md, from the module and the file that it prints."""
    printed = {s.kind: s for s in SNIPPETS if s.document == "own.md" and "apitals" in s.text}
    capitals_module(printed["python"], "", place)
    (place.folder / "mine" / "task").mkdir(parents=True)
    (place.folder / "mine" / "task" / "capitals.yaml").write_text(printed["yaml"].text)
    row = {"country": "France", "capital": "Paris"}
    (place.folder / "capitals.jsonl").write_text(json.dumps(row) + "\n")
    run(Snippet("own.md", "command", f"python run.py {snippet.text}"), more, place)
    assert "capitals" in (place.folder / "run" / "table.md").read_text()


def yaml_file(snippet: Snippet, more: str, place: Place) -> None:
    """Composes with a file that a document prints, under the name in `more`."""
    path = place.folder / "mine" / f"{more}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(snippet.text)
    group, _, name = more.partition("/")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = ["experiment=none", "name=x", f"hydra.searchpath=[file://{place.folder}/mine]"]
        cfg = compose("config", [*given, f"{group}={name}"])
    (key, *_) = yaml.safe_load(snippet.text)
    assert OmegaConf.select(cfg, f"{group}.{key}")


def own_file(snippet: Snippet, more: str, place: Place) -> None:
    """Composes with a file outside of conf/, as the command line takes it."""
    shutil.copy(ROOT / "conf" / "triple" / "pocket.yaml", place.folder / "mine.yaml")
    words = given.take([snippet.text.replace("/path", str(place.folder))])
    for name in ("config", "serve"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(name, words)
        assert cfg.triple.tuned.id.endswith("pocket/models/tuned")


def own_formula(snippet: Snippet, more: str, place: Place) -> None:
    """Runs a command with the formula that the same document prints."""
    (printed,) = (s for s in SNIPPETS if s.document == "formulas.md" and "def halfway" in s.text)
    (place.folder / "halfway.py").write_text(printed.text)
    place.patch.syspath_prepend(place.folder)
    run(snippet, more, place)


def json_part(snippet: Snippet, more: str, place: Place) -> None:
    """A part of a JSON object."""
    assert json.loads(f"{{{snippet.text}}}")


def serves(snippet: Snippet, more: str, place: Place) -> None:
    """The command was started by the fixture, which waits until it answers."""
    assert shlex.split(snippet.text.removeprefix(".venv/bin/")) == [*SERVE, "port=8000"]
    url = place.request.getfixturevalue("server")
    key = {"Authorization": "Bearer secret"}
    models = requests.get(f"{url}/v1/models", headers=key, timeout=20).json()
    assert [model["id"] for model in models["data"]] == ["pocket-proxy"]


@contextmanager
def started_server(*words: str) -> Iterator[str]:
    """Starts the console script on a free port; what it says once it can be reached."""
    start = [sys.executable, "-c", "from proxytune.cli import main; main()", *words, "port=0"]
    environment = os.environ | {"PROXYTUNE_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def serves_the_page(snippet: Snippet, more: str, place: Place) -> None:
    """The page is there, and is told the triple's systems and prompts of its tasks."""
    _, *words = shlex.split(snippet.text)
    with started_server(*words) as said:
        home = re.findall(r"http://[\d.]+:\d+", said)[0]
        assert "proxytune playground" in requests.get(home, timeout=20).text
        key = {"Authorization": "Bearer secret"}
        told = requests.get(f"{home}/v1/playground", headers=key, timeout=20).json()
    assert [each["model"] for each in told["systems"]] == [
        f"pocket-{system}" for system in ("base", "expert", "proxy", "tuned")
    ]
    assert told["examples"]


def announces(snippet: Snippet, more: str, place: Place) -> None:
    """What a started server says."""
    url = place.request.getfixturevalue("server")
    assert place.request.getfixturevalue("server_said") == place.local(snippet.text).strip()
    assert url in place.local(snippet.text)


def member_arguments(snippet: Snippet, more: str, place: Place) -> None:
    """A setting of lm-eval's --model_args."""
    members = {"math_expert": "m", "math_antiexpert": "n"}
    members |= dict(each.split("=") for each in snippet.text.split(","))
    alphas_of(members)
    specs_of({"base": "b", "expert": "e", "antiexpert": "a"}, "auto", None, members)


def formula_arguments(snippet: Snippet, more: str, place: Place) -> None:
    """A formula of lm-eval's --model_args."""
    members: dict[str, Any] = dict(each.split("=") for each in snippet.text.split(","))
    formula = formula_of(members.pop("formula"), members)
    assert formula is not None and not members
    needs_of(formula)  # each of its settings has a value


def accelerate_takes(snippet: Snippet, more: str, place: Place) -> None:
    """accelerate's own command line understands it, and the command that it starts composes."""
    from accelerate.commands.launch import launch_command_parser

    (_, _, *words) = shlex.split(snippet.text)
    given = launch_command_parser().parse_args(words)
    assert given.use_fsdp and (ROOT / given.training_script).is_file()
    settings = " ".join(given.training_script_args)
    composes(Snippet(snippet.document, "command", settings), "train", place)


def collected(snippet: Snippet, more: str, place: Place) -> None:
    """The tests are there; they run with the others."""
    words = shlex.split(snippet.text)[1:]
    files = [word for word in words if word.startswith("tests/")]
    assert files and all("def test_" in (ROOT / file).read_text() for file in files)
    assert [word for word in words if word not in files] in ([], ["-m", "slow"])


def extra_exists(snippet: Snippet, more: str, place: Place) -> None:
    """pip is not run; the extra that it is to install has to be there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"\[(\w+)\]", snippet.text))
    assert extras <= project["optional-dependencies"].keys()


def skip(snippet: Snippet, more: str, place: Place) -> None:
    """Says why nothing is done."""
    pytest.skip(more)
