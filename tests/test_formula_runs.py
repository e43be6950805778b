"""Formulas from the command line: tables, identities, refusals; on the pocket models."""

import json
from pathlib import Path

import pandas as pd
import pytest

from proxytune import cli
from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.loading.build import same_checkpoint
from proxytune.loading.spec import ModelSpec
from tests.commands import call

TASK = ["task=[pocket_triviaqa]", "limit=6", "report=false"]

OWN = '''"""A formula of one's own."""


def halfway(base, expert, antiexpert, alpha, ceiling=5.0):
    shift = expert.float() - antiexpert.float()
    return base.float() + alpha * shift.clamp(-ceiling, ceiling)
'''


def run(folder: Path, *arguments: str):
    return call(cli.run, *TASK, f"output_dir={folder}", *arguments)


def texts(folder: Path, system: str = "proxy") -> dict[str, str]:
    lines = (folder / "pocket_triviaqa" / system / "completions.jsonl").read_text().splitlines()
    return {each["example_id"]: each["text"] for each in map(json.loads, lines)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of proxy-tuning's own formula."""
    folder = tmp_path_factory.mktemp("plain")
    done = run(folder, "systems=[base,proxy]")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_gate_that_only_certainty_closes_is_proxy_tuning_and_counts_tokens(plain, tmp_path):
    done = run(tmp_path, "systems=[base,proxy]", "formula=gated", "formula.threshold=1.0")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path) == texts(plain)
    table = pd.read_csv(tmp_path / "table.csv").set_index("metric")
    assert 50 < table.loc["touched_tokens", "proxy"] <= 100
    cell = json.loads((tmp_path / "pocket_triviaqa" / "proxy" / "cell.json").read_text())
    assert cell["formula"] == {"_target_": "proxytune.formula.gated", "threshold": 1.0}


@pytest.mark.slow
def test_a_gate_that_is_never_open_is_the_base(plain, tmp_path):
    done = run(tmp_path, "systems=[proxy]", "formula=gated", "formula.threshold=0.0")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "pocket_triviaqa" / "proxy" / "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["extra"]["touched"] for line in lines} == {0}
    assert texts(tmp_path) == texts(plain, "base")


def test_the_default_formula_stands_in_no_identity(plain):
    cell = json.loads((plain / "pocket_triviaqa" / "proxy" / "cell.json").read_text())
    assert "formula" not in cell


def test_another_formula_does_not_continue_a_folder(plain):
    before = texts(plain)
    done = run(plain, "systems=[base,proxy]", "formula=dexperts")
    assert done.returncode == 1
    assert "holds completions of another configuration (formula" in done.stderr
    assert texts(plain) == before


@pytest.mark.slow
def test_contrastive_decoding_needs_two_models(tmp_path):
    done = run(tmp_path, "systems=[base,proxy]", "formula=contrastive", "triple.expert.id=nowhere")
    assert done.returncode == 0, done.stderr
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["models"].keys() == {"base", "antiexpert"}


@pytest.mark.slow
def test_guidance_reads_one_checkpoint_under_two_formats(tmp_path):
    same = "triple.antiexpert.id=${triple.base.id}"
    chat = ["triple.antiexpert.format.kind=chat", "triple.antiexpert.format.chat_template=llama2"]
    done = run(tmp_path, "systems=[proxy]", "formula=guidance", "alpha=0.5", same, *chat)
    assert done.returncode == 0, done.stderr
    assert len(texts(tmp_path)) == 6


@pytest.mark.slow
def test_a_formula_of_ones_own_and_its_source_in_the_identity(plain, tmp_path, monkeypatch):
    (tmp_path / "halfway_formula.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = "formula._target_=halfway_formula.halfway"
    done = run(tmp_path / "wide", "systems=[proxy]", own, "formula.ceiling=1e9")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "wide") == texts(plain)
    cell = json.loads((tmp_path / "wide" / "pocket_triviaqa" / "proxy" / "cell.json").read_text())
    assert cell["formula"]["ceiling"] == 1e9
    assert len(cell["formula"]["source_sha256"]) == 64


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["formula=gatd"], "gated"),
        (["formula._target_=nowhere.f"], "_target_=nowhere.f cannot be imported"),
        (["formula._target_=math.pi"], "_target_=math.pi is 3.14"),
        (["formula=gated", "formula.threshold=2"], "threshold must be a probability"),
        (["formula=dexperts", "formula.top_p=0"], "top_p"),
        (["formula=gated", "formula.treshold=0.5"], "treshold"),
        (["formula=contrastive", "triple.antiexpert.id=/nowhere"], "/nowhere"),
        (["formula._target_=torch.add"], "formula"),
    ],
)
def test_a_wrong_formula_is_one_line(arguments, said, tmp_path):
    done = run(tmp_path, "systems=[proxy]", *arguments)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_lm_eval_takes_a_formula_by_its_name():
    """`formula=gated,formula_threshold=...` in --model_args; a closed gate is the base."""
    from proxytune.harness.model import ProxyTuneLM

    models = {r: f"pocket/models/{r}" for r in ("base", "expert", "antiexpert")}
    settings = {"dtype": "float32", "progress": False}

    def rated(**more) -> float:
        model = ProxyTuneLM(**more, **settings)
        pair = model._encode_pair("Question: What is 12", " + 12")
        ((total, _),) = model._loglikelihood_tokens([(None, *pair)])
        return total

    closed = rated(**models, formula="gated", formula_threshold=0.0)
    assert closed == pytest.approx(rated(base=models["base"]), abs=1e-4)
    one = ProxyTuneLM(**models, formula="gated", formula_threshold=0.5, **settings)
    assert one.get_model_info()["proxytune_formula"] == {"name": "gated", "threshold": 0.5}
    for wrong, words in (
        ({"formula": "nowhere"}, "formula=nowhere cannot be imported"),
        ({"formula_threshold": 0.5}, "is given without formula"),
        ({"formula": "contrastive"}, "combines the base with antiexpert"),
    ):
        with pytest.raises(UserError, match=words):
            ProxyTuneLM(**models, **wrong, **settings)


def test_one_folder_is_one_checkpoint_however_it_is_written(monkeypatch):
    monkeypatch.chdir(ROOT)
    base = ModelSpec(id="pocket/models/base")
    assert same_checkpoint(base, ModelSpec(id=str(ROOT / base.id)))
    assert not same_checkpoint(base, ModelSpec(id="pocket/models/expert"))
