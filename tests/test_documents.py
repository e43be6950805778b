"""What README.md and docs/ print is run here as it is printed, with local models for the hub's.

`RULES` says of every command, setting and snippet what is done with it; `SWAPS` is the one table of
what stands in for what. A command that is new in a document needs a rule, and a rule that fits
nothing any more has to go.
"""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from proxytune.config import given, schema
from proxytune.files import ROOT
from proxytune.harness.arguments import specs_of
from proxytune.training import config as training
from tests.documents import Snippet, snippets
from tests.openai_server import openai_server
from tests.test_alpaca_judge import prefers_good, weighs
from tests.test_rescore import put

# docs/log.md is history: its commands were true on their day
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [s for path in DOCUMENTS if path.name != "log.md" for s in snippets(path)]

# printed -> local, in this order; {tmp} is the test's folder, {server} and {judge} stand-ins' URLs
SWAPS = {
    ".venv/bin/": "",
    "Qwen/Qwen2.5-7B-Instruct": "pocket/models/tuned",
    "Qwen/Qwen2.5-0.5B-Instruct": "pocket/models/expert",
    "Qwen/Qwen2.5-0.5B": "pocket/models/antiexpert",
    "Qwen/Qwen2.5-7B": "pocket/models/base",
    "meta-llama/Llama-2-7b-hf": "pocket/models/antiexpert",
    "ANTIEXPERT": "pocket/models/antiexpert",
    "EXPERT": "pocket/models/expert",
    "BASE": "pocket/models/base",
    "data=gsm8k": "data=gsm8k data_file=pocket/data/train/gsm8k.jsonl",
    "task=[gsm8k,truthfulqa_mc]": "task=[gsm8k,truthfulqa_mc] "
    "task.gsm8k.path=pocket/data/test/gsm8k.jsonl "
    "task.truthfulqa_mc.path=pocket/data/test/TruthfulQA.csv",
    "task=alpaca_eval": "task=alpaca_eval task.alpaca_eval.path={tmp}/alpaca.json",
    "arc_easy,hellaswag": "tiny_choice --include_path tests/lm_eval_tasks --limit 2",
    "limit=50": "limit=2",
    "../shared/published": "published",
    "results/bench/": "{tmp}/",
    "results/experts/": "{tmp}/",
    "/tmp/check": "{tmp}/check",
    "http://127.0.0.1:8000": "{server}",
    "http://localhost:8000/v1": "{judge}",
    "OPENAI_API_KEY=...": "OPENAI_API_KEY=secret OPENAI_BASE_URL={judge}",
    "task=capitals": "task=capitals hydra.searchpath=[file://{tmp}/mine] "
    "task.capitals.path={tmp}/capitals.jsonl",
}
ONE = "limit=1 report=false output_dir={tmp}/run"


@dataclass(frozen=True)
class Rule:
    """What is done with the snippets whose name (document: text) fits a pattern.

    Attributes:
        pattern: fits from the beginning to the end.
        action: takes the snippet, the rule's `more`, and the place where it runs.
        more: for `run`: arguments that say where to write, and to do little.
            For `skip`: why it cannot run. For `composes`: the file of conf/.
        slow: whether it takes more than a few seconds.
    """

    pattern: str
    action: Callable[[Snippet, str, "Place"], None]
    more: str = ""
    slow: bool = False


@dataclass
class Place:
    """A folder in which the repository's files seem to lie, and what a command needs there."""

    folder: Path
    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest
    said: pytest.CaptureFixture[str]

    def local(self, text: str) -> str:
        """The text with everything exchanged that is not on this machine."""
        for printed, ours in SWAPS.items():
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
    """Runs a command on what the one printed before it left behind."""
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


def announces(snippet: Snippet, more: str, place: Place) -> None:
    """What a started server says."""
    url = place.request.getfixturevalue("server")
    assert place.request.getfixturevalue("server_said") == place.local(snippet.text).strip()
    assert url in place.local(snippet.text)


def member_arguments(snippet: Snippet, more: str, place: Place) -> None:
    """A setting of lm-eval's --model_args."""
    members = dict([snippet.text.split("=")])
    specs_of({"base": "b", "expert": "e", "antiexpert": "a"}, "auto", None, members)


def accelerate_takes(snippet: Snippet, more: str, place: Place) -> None:
    """accelerate's own command line understands it, and what is behind it composes."""
    from accelerate.commands.launch import launch_command_parser

    (_, _, *words) = shlex.split(snippet.text)
    given = launch_command_parser().parse_args(words)
    assert given.use_fsdp and (ROOT / given.training_script).is_file()
    settings = " ".join(given.training_script_args)
    composes(Snippet(snippet.document, "command", settings), "train", place)


def extra_exists(snippet: Snippet, more: str, place: Place) -> None:
    """pip is not run; the extra that it is to install has to be there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"\[(\w+)\]", snippet.text))
    assert extras <= project["optional-dependencies"].keys()


def skip(snippet: Snippet, more: str, place: Place) -> None:
    """Says why nothing is done."""
    pytest.skip(more)


# -- the table --------------------

ANY = r"[\w.]+: (?:\.venv/bin/)?"
RULES = [
    # run.py
    Rule(
        ANY + r"python run\.py name=mine task=\[gsm8k,truthfulqa_mc\] limit=50 .*",
        run,
        "output_dir={tmp}/run",
    ),
    Rule(ANY + r"python run\.py", run, ONE + " decoding.n=1", slow=True),
    Rule(ANY + r"python run\.py experiment=pocket_black_box", run, ONE),
    Rule(ANY + r"python run\.py experiment=llama70b_chat --cfg job", run),
    Rule(
        ANY + r"python run\.py -m alpha=0\.5,1\.0,1\.5",
        run,
        ONE + " task=[pocket_toxigen] systems=[proxy]",
        slow=True,
    ),
    Rule(ANY + r"python run\.py experiment=gpt35_realtimeqa .*", composes),
    Rule(ANY + r"run\.py experiment=\w+", composes),
    Rule(ANY + r"python run\.py task=\[lm_eval/arc_easy,lm_eval/wikitext\]", composes),
    Rule(
        r"judges.md: OPENAI_API_KEY=\.\.\. python run\.py task=alpaca_eval .*",
        run,
        ONE + " systems=[tuned] task.alpaca_eval.judge.cache={tmp}/j.sqlite",
    ),
    Rule(
        r"judges.md: python run\.py task=alpaca_eval .*(base_url|local).*",
        run,
        ONE + " systems=[tuned] task.alpaca_eval.judge.cache={tmp}/j.sqlite "
        "task.alpaca_eval.judge.max_unparsed=1",
    ),
    # settings in the text
    Rule(r"repro.md: ARGS=\S+", make_prints),
    Rule(r"lm_eval.md: (base_load_in_4bit|expert_\w+)=\w+", member_arguments),
    Rule(r"lm_eval.md: (task)?\.\S+", composes, "config task=[lm_eval/arc_easy]"),
    Rule(r"own.md: task=capitals", capitals, ONE + " systems=[base,proxy]"),
    Rule(r"serving.md: (system|machine(\.\w+)?)=\S+", composes, "serve"),
    Rule(
        r"training.md: [a-z_.]+=\S+( [a-z_]+=\S+)*", composes, "train model=m data=d output_dir=o"
    ),
    Rule(r"README.md: triple=/path/mine\.yaml", own_file),
    Rule(r"README.md: triple=mine", skip, "a file that the reader is told to write"),
    Rule(r'README.md: speculative="auto"', skip, "an argument of `generate`, run in its snippet"),
    Rule(r"own.md: results/runs/NAME/alpha=0\.5", skip, "a folder's name"),
    Rule(r"serving.md: PROXYTUNE_API_KEY=secret", skip, "how the server of these tests is started"),
    Rule(
        r"(README|black_box|judges|lm_eval|models|own|performance|repro)\.md: (-m )?[\w.]+=\S+",
        composes,
    ),
    # make
    Rule(ANY + r"make .*", make_prints),
    # other scripts
    Rule(
        r"black_box.md: python scripts/bench_api\.py --json results/bench/api\.json",
        run,
        "--prompts 1",
        slow=True,
    ),
    Rule(r"performance.md: scripts/bench_api\.py", skip, "a file's name; black_box.md runs it"),
    Rule(
        r"performance.md: python scripts/bench\.py .*",
        run,
        "--size tiny --rounds 1",
        slow=True,
    ),
    Rule(r"repro.md: python scripts/rescore\.py \.\./shared/published --json .*", run),
    Rule(r"repro.md: python scripts/make_tables\.py --table 2", run, "--results {tmp}/results"),
    Rule(r"repro.md: python scripts/make_tables\.py --table 2 --rescored .*", rescored),
    Rule(
        r"training.md: python scripts/train_expert\.py .*",
        run,
        "train=pocket steps=1",
    ),
    Rule(r"training.md: accelerate launch .*", accelerate_takes),
    Rule(
        r"lm_eval.md: python -m proxytune\.harness run .*",
        run_outside,
        slow=True,
    ),
    Rule(r"models.md: pytest .* tests/test_families\.py", skip, "a test; `make test-slow` runs it"),
    # the server and its clients
    Rule(ANY + r"proxytune serve triple=pocket port=8000", serves),
    Rule(ANY + r"proxytune serve( triple=\.\.\. key=value \.\.\.)?", skip, "its name and form"),
    Rule(r"serving.md: serving pocket-proxy on .*", announces),
    Rule(r"serving.md: curl .*", run_outside),
    Rule(r"serving.md: OPENAI_API_KEY=secret lm_eval run .*", run_outside, slow=True),
    Rule(r"serving.md: (from openai import|import requests).*", python_block),
    # whole snippets
    Rule(r"README.md: import proxytune.*", python_block),
    Rule(r'own.md: """Capitals of countries.*', capitals_module),
    Rule(r"own.md: capitals: .*", yaml_file, "task/capitals"),
    Rule(r"black_box.md: # conf/triple/mine\.yaml .*", yaml_file, "triple/mine"),
    Rule(r'black_box.md: "extra": .*', json_part),
    # what is no command
    Rule(r"README.md: logits = .*", skip, "the formula"),
    Rule(
        r"(README.md: run\.py the|own.md: table\.md,|developing.md: harness, cli) .*",
        skip,
        "what lies where",
    ),
    # other programs
    Rule(ANY + r"pip install '?(proxytune|\.)(\[\w+\])?'?", extra_exists),
    Rule(
        ANY + r"(pip install 'lm-eval.*|vllm serve .*|hf auth login|git clone .*)",
        skip,
        "another program's, which needs a network, a GPU or an account",
    ),
]


def rule_of(snippet: Snippet) -> Rule | None:
    """The first rule that fits."""
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, snippet.name)), None)


def cases() -> Iterator[pytest.ParameterSet]:
    """Every snippet with its rule; a command that several documents print comes once."""
    seen = set()
    for snippet in SNIPPETS:
        rule = rule_of(snippet)
        known = (snippet.kind, snippet.text.removeprefix(".venv/bin/"), rule and rule.more)
        if rule and known not in seen:
            seen.add(known)
            marks = [pytest.mark.slow] if rule.slow else []
            yield pytest.param(snippet, rule, id=snippet.name[:70], marks=marks)


def test_everything_that_is_printed_has_a_rule():
    lost = [f"{s.kind} in {s.name}" for s in SNIPPETS if rule_of(s) is None]
    assert not lost, (
        "no rule says what is done with these; add one to RULES in tests/test_documents.py, and "
        "what stands in for models and data to SWAPS: " + "\n".join(lost)
    )


def test_every_rule_and_swap_is_used():
    used = {id(rule_of(snippet)) for snippet in SNIPPETS}
    assert not [rule.pattern for rule in RULES if id(rule) not in used], "take these rules out"
    text = "\n".join(snippet.text for snippet in SNIPPETS)
    assert not [printed for printed in SWAPS if printed not in text], "take these swaps out"


def test_a_new_command_is_found_wherever_it_stands(tmp_path):
    """Fenced, indented, in the text or a table; outputs and comments are no commands."""
    page = tmp_path / "new.md"
    page.write_text(
        "Say `python scripts/new.py a` or\n`hf upload b`, `new.key=1` and not `make` alone.\n\n"
        "    # a comment that isn't one\n    A=1 make new \\\n        X=1   # the user's\n"
        '    curl -d \'{"a": 1,\n             "b": 2}\'\n\n'
        "| a |\n|---|\n| `run.py c=1` |\n\n```\nproxytune new d\n```\n\n    its output\n\n"
        "```python\nprint(1)\n```\n\n    1\n\nText.\n\n    a drawing\n"
    )
    found = snippets(page)
    assert [(s.kind, s.text.split()[-1], s.output) for s in found] == [
        ("command", "X=1", ""),
        ("command", "2}'", ""),
        ("command", "d", ""),
        ("python", "print(1)", "1"),
        ("block", "drawing", ""),
        ("command", "a", ""),
        ("command", "b", ""),
        ("setting", "new.key=1", ""),
        ("command", "c=1", ""),
    ]
    assert [s.text for s in found if rule_of(s)] == []


@pytest.mark.parametrize(("snippet", "rule"), list(cases()))
def test_what_is_printed_works(snippet, rule, place):
    rule.action(snippet, rule.more, place)


# -- the place --------------------


@pytest.fixture
def place(tmp_path, monkeypatch, request, capsys) -> Place:
    for entry in ("conf", "pocket", "proxytune", "run.py", "scripts", "tasks", "tests"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    schema.register()
    training.register()
    GlobalHydra.instance().clear()
    (tmp_path / "alpaca.json").write_text('[{"instruction": "Say hello.", "output": "Hello."}]')
    answer = {"question": "q", "answer": "3", "model_output": "1 3.", "prediction": "3"}
    put(tmp_path / "published" / "gsm" / "dexperts-13B", "predictions.jsonl", [answer])
    put(tmp_path / "published" / "gsm" / "dexperts-13B", "metrics.json", {"exact_match": 1.0})
    return Place(tmp_path, monkeypatch, request, capsys)


SERVE = ["proxytune", "serve", "triple=pocket"]


@pytest.fixture(scope="module")
def server_said() -> Iterator[str]:
    """Starts the server of docs/serving.md on a free port; what it says once it can be reached."""
    start = [sys.executable, "-c", "from proxytune.cli import main; main()", *SERVE[1:], "port=0"]
    environment = os.environ | {"PROXYTUNE_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def server(server_said) -> str:
    """Its address."""
    return re.findall(r"http://[\d.]+:\d+", server_said)[0]


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """An OpenAI-compatible endpoint that answers as AlpacaEval's annotators expect."""
    with openai_server(lambda body: (weighs if "logprobs" in body else prefers_good)(body)) as fake:
        yield fake.url
