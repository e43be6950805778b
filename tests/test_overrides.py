"""Every optional part of the schemas is set, extended and unset without `+`, wherever it stands."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from proxytune import cli
from proxytune.cli.guard import explain
from proxytune.config import schema
from proxytune.config.overrides import part_of
from proxytune.config.specs import model_specs
from proxytune.files import ROOT
from proxytune.training.config import TrainConfig
from proxytune.training.config import register as register_training

SCHEMAS = {"config": schema.RunConfig, "serve": schema.ServeConfig, "train": TrainConfig}
# how an experiment begins decides what is there to be set: nothing, all of it, an API
STARTS = {
    "config": ["experiment=none", "experiment=llama13b_chat", "experiment=gpt35_realtimeqa"],
    "serve": ["triple=pocket", "triple=pocket_api"],
    "train": ["train=full"],
}


def optional(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and type of every field that may be null, and of every mapping that takes new keys.

    A mapping to parts (`triple.pairs`) has tests of its own (test_pairs.py).
    """
    hints = get_type_hints(schema)
    for field in fields(schema):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        part, closed = part_of(schema, field.name)
        if part is dict and any(map(is_dataclass, get_args(hint))):
            continue
        if NoneType in get_args(hint) or (part is dict and not closed):
            yield path, part or next(kind for kind in get_args(hint) if kind is not NoneType)
        if part is not None and is_dataclass(part):
            yield from optional(part, f"{path}.")


OPTIONAL = {name: dict(optional(schema)) for name, schema in SCHEMAS.items()}
PARTS = {
    name: {path: kind for path, kind in found.items() if kind is dict or is_dataclass(kind)}
    for name, found in OPTIONAL.items()
}
VALUES = {str: "word", int: 3, float: 0.5}


@pytest.fixture(autouse=True)
def hydra_at_conf():
    schema.register()
    register_training()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def settings_of(kind: Any) -> dict[str, Any]:
    """Two settings of a part, with values."""
    if kind is dict:
        return {"base": "auto", "expert": "cpu"}
    hints = get_type_hints(kind)
    plain = {f.name: VALUES[hints[f.name]] for f in fields(kind) if hints[f.name] in VALUES}
    return dict(list(plain.items())[:2])


def test_the_walk_finds_them_all():
    found = OPTIONAL["config"]
    members = ("base", "expert", "antiexpert", "tuned")
    parts = PARTS["config"].keys()
    own = {"triple.tuned", "paper", "machine.devices", "machine.max_memory", "engine.options"}
    assert parts == own | {
        f"triple.{member}.{part}"
        for member in members
        for part in ("api", "quantization", "max_memory", "format.template_kwargs")
    }
    assert {"limit", "decoding.n", "triple.base.api.max_requests"} <= found.keys() - parts
    assert "task" not in found  # its names come from files


FORMS = {
    "a setting": lambda path, one, two: [f"{path}.{one}"],
    "two settings": lambda path, one, two: [f"{path}.{one}", f"{path}.{two}"],
    "a mapping": lambda path, one, two: [f"{path}={{{one.replace('=', ': ')}}}"],
    "a setting after null": lambda path, one, two: [f"{path}=null", f"{path}.{one}"],
    "with a plus": lambda path, one, two: [f"++{path}.{one}"],
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "start"), [(n, s) for n in STARTS for s in STARTS[n]])
def test_every_part_is_set_and_extended_in_one_form(name, start, form):
    wanted, given = {}, [start]
    for path, kind in PARTS[name].items():
        settings = list(settings_of(kind).items())
        given += FORMS[form](path, *(f"{key}={value}" for key, value in settings))
        wanted |= {f"{path}.{key}": value for key, value in settings[: 1 + (form[:3] == "two")]}
    if form == "a setting after null":  # a part of a part comes after it
        given[1:] = sorted(given[1:], key=lambda word: "=null" not in word)
    cfg = compose(name, given)
    assert {path: OmegaConf.select(cfg, path) for path in wanted} == wanted
    assert is_closed(cfg), "the rest of the configuration still refuses unknown keys"


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("name", "start"), [(n, s) for n in STARTS for s in STARTS[n]])
def test_every_part_is_unset(name, start):
    # the last ones first: a part of a part is gone with it
    cfg = compose(name, [start, *(f"{path}=null" for path in reversed(PARTS[name]))])
    for path in PARTS[name]:
        assert OmegaConf.select(cfg, path) is None


def is_closed(cfg: DictConfig) -> bool:
    """Whether a key that no schema has is refused."""
    try:
        cfg.alhpa = 1
    except Exception:
        return True
    return False


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", SCHEMAS)
def test_plain_settings_are_set_and_unset(name):
    plain = {p: kind for p, kind in OPTIONAL[name].items() if kind in VALUES}
    (start, *_) = STARTS[name]
    given = compose(name, [start, *(f"{path}={VALUES[kind]}" for path, kind in plain.items())])
    unset = compose(name, [start, *(f"{path}=null" for path in plain)])
    for path, kind in plain.items():
        assert OmegaConf.select(given, path) == VALUES[kind]
        assert OmegaConf.select(unset, path) is None
    assert plain


def test_files_set_and_unset_the_same_parts(tmp_path):
    """A null of a triple's file is filled by the experiment's, and by the command line."""
    conf = tmp_path / "conf"
    for group, text in {
        "triple": "base: {id: a, quantization: null, api: null}\ntuned: null\n",
        "experiment": (
            "# @package _global_\ndefaults:\n  - override /triple: mine\n"
            "triple:\n  tuned: {id: t}\n  base: {quantization: {load_in_4bit: true}}\n"
            "machine: {devices: {base: auto}}\npaper: {table: '2', size: 13B}\n"
        ),
    }.items():
        (conf / group).mkdir(parents=True)
        (conf / group / "mine.yaml").write_text(text)
    path = [f"hydra.searchpath=[file://{conf}]"]
    cfg = compose("config", ["experiment=mine", "name=mine", *path])
    assert cfg.triple.tuned.id == "t" and cfg.triple.base.quantization.load_in_4bit
    assert cfg.machine.devices == {"base": "auto"} and cfg.paper.size == "13B"
    given = ["triple.tuned.id=T", "triple.base.quantization.load_in_8bit=true"]
    given += ["triple.base.api={base_url: u, model: m}"]
    cfg = compose("config", ["experiment=none", "name=mine", "triple=mine", *path, *given])
    assert cfg.triple.tuned.id == "T" and cfg.triple.base.api.model == "m"
    assert model_specs(cfg)["base"].quantization == {"load_in_8bit": True}


@pytest.mark.thinned(1)
def test_a_task_takes_every_setting_of_its_class_and_of_decoding():
    judge = "task.alpaca_eval.judge"
    given = ["task=[gsm8k,alpaca_eval]", "task.gsm8k.decoding.temperature=0.5"]
    given += [f"{judge}.cache=null", f"{judge}.local={{id: x}}", f"{judge}.max_unparsed=0.5"]
    task = compose("config", given).task
    assert task.gsm8k.decoding == {"temperature": 0.5}
    assert (task.alpaca_eval.judge.cache, task.alpaca_eval.judge.max_unparsed) == (None, 0.5)
    for misspelt in ("task.gsm8k.pth=x", f"{judge}.cahe=x", f"{judge}={{cahe: x}}"):
        with pytest.raises(Exception) as caught:
            compose("config", [*given, misspelt])
        assert "(did you mean " in explain(caught.value)


# -- the real command line --------------------

MEMBERS = [f"triple.{m}.id={ROOT}/pocket/models/{m}" for m in ("base", "expert", "antiexpert")]
TUNED = f"triple.tuned.id={ROOT}/pocket/models/tuned"
SMALL = ["experiment=none", "name=mine", "task=[pocket_toxigen]", "limit=1", "report=false"]


def run(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit code and output of run.py in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    GlobalHydra.instance().clear()
    try:
        cli.run()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.slow
def test_a_triple_is_named_and_its_parts_changed_on_the_command_line(monkeypatch, capsys, tmp_path):
    common = [*SMALL, *MEMBERS, f"output_dir={tmp_path}", "triple.expert.format.kind=chat"]
    devices = ["machine.devices.base=cpu", "machine.device=cpu"]
    code, said = run(monkeypatch, capsys, *common, TUNED, *devices)
    assert code == 0 and "tuned" in said
    # null is what is not said: the same folder goes on
    same = ["machine.devices=null", "triple.base.quantization=null", "triple.base.api=null"]
    code, said = run(monkeypatch, capsys, *common, TUNED, *same, "paper=null")
    assert code == 0, said


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the triple has no tuned; give one (triple.tuned.id=...)"),
        (["triple.tuned.format.kind=chat"], "the triple has no tuned; give one"),
        ([TUNED, "triple.base.api.max_requests=5"], "triple.base.api has no base_url; give triple"),
        ([TUNED, "paper.table=2"], "paper has no size; give paper.size=..."),
        ([TUNED, "machine.devices.bsae=cpu"], "machine.devices.bsae: members are base, expert"),
        ([TUNED, "triple.base.quantization.load_in_4bits=true"], "no 'load_in_4bits'; there are"),
        (["triple.tuned=pocket/models/tuned"], "name it with triple.tuned.id=..."),
        (["triple.tuned.id=null"], "triple.tuned.id needs a value"),
        ([TUNED, "~triple.tuned"], "triple.tuned=null does it"),
        (["triple.base.api=http://x/v1"], "triple.base.api.NAME=..."),
        (["machine.devices=cuda:0"], "machine.devices.NAME=..."),
        (["triple=null"], "cannot be null"),
        (["triple.tuned.id=~/models/x"], "cannot read 'triple.tuned.id=~/models/x'"),
        (["triple.tuned.id"], "a setting is key=value"),
        (["task.gsm8k.path=x"], "task 'gsm8k' is not chosen; chosen: pocket_toxigen; task=[gsm8k]"),
        (["task=[gsm9k]"], "unknown task 'gsm9k' (did you mean gsm8k?); known: alpaca_eval, "),
        (["task=[pocket_toxigen,gsm9k]"], "unknown task 'gsm9k' (did you mean gsm8k?); known: "),
        (["task=[arc_easy]"], "lm_eval/NAME is any task of lm-evaluation-harness"),
        (["name="], "the experiment has no name"),
        ([TUNED, "+beta=2"], "unknown key 'beta'"),
        ([TUNED, "~alpha"], "~alpha: it cannot be deleted"),
        ([TUNED, "alpha=abc"], "alpha=abc: it must be a number"),
        ([TUNED, "task=a,b"], "task=[a,b] is a list, and -m before it a sweep"),
        ([TUNED, "limit=2.5"], "limit=2.5: it must be a whole number"),
        ([TUNED, "decoding.trace=maybe"], "decoding.trace=maybe: it must be true or false"),
        ([TUNED, "systems=base"], "systems is a list: systems=[ONE,TWO]"),
        ([TUNED, "decoding.speculative=maybe"], "decoding.speculative=maybe: it must be auto"),
        ([TUNED, "formula.threshold=0.5"], "threshold is a setting of formula=gated"),
        ([TUNED, "formula=halfway.halfway"], "formula._target_=MODULE.NAME is a function of your"),
        ([TUNED, "task=[x/mine.yaml]"], "task=x/mine.yaml: there is no such file"),
        ([TUNED, "triple=pocket.yaml"], "proxytune's own is triple=pocket"),
    ],
)
def test_a_mistake_about_a_part_is_one_line_with_the_way_out(
    words, line, monkeypatch, capsys, tmp_path
):
    code, said = run(monkeypatch, capsys, *SMALL, *MEMBERS, f"output_dir={tmp_path}", *words)
    (error,) = [each for each in said.splitlines() if each.startswith("error: ")]
    assert code == 1 and line in error and "Traceback" not in said
