"""Every experiment composes, and a misspelt name or key is refused in one line."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from proxytune.cli.guard import explain
from proxytune.config.schema import register as register_schema
from proxytune.config.schema import to_dict
from proxytune.config.specs import model_specs
from proxytune.files import ROOT

EXPERIMENTS = sorted(
    p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml") if p.stem != "none"
)
TRIPLES = sorted(p.stem for p in (ROOT / "conf" / "triple").glob("*.yaml"))
MACHINES = sorted(p.stem for p in (ROOT / "conf" / "machine").glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_at_conf():
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def test_the_issue_s_experiments_are_there():
    wanted = {"pocket", "llama13b_chat", "llama70b_chat"}
    wanted |= {f"llama{s}_{k}" for s in ("13b", "70b") for k in ("code", "triviaqa", "gsm")}
    assert wanted <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_starts_with_its_command(name):
    cfg = compose("config", [f"experiment={name}"])
    plain = to_dict(cfg)
    assert plain["name"] == name
    assert plain["task"], "an experiment without a task measures nothing"
    for role in ("base", "expert", "antiexpert"):
        assert plain["triple"][role]["id"]
    for system in plain["systems"]:
        assert system in ("base", "expert", "antiexpert", "proxy", "tuned")
    text = Path(ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert "# python run.py" in "\n".join(text.splitlines()[:2])
    assert len(text.splitlines()) <= 15


@pytest.mark.parametrize("name", TRIPLES)
def test_every_triple_composes(name):
    triple = compose("config", [f"triple={name}"]).triple
    assert triple.base.id
    pairs = triple.pairs.values() if triple.pairs else [triple]
    ids = [triple.base.id, *(id for pair in pairs for id in (pair.expert.id, pair.antiexpert.id))]
    assert all(ids)
    # R1's distillates have other names than Qwen's for special tokens: strict refuses them.
    distilled = ["R1-Distill-Qwen" in id for id in ids]
    if any(distilled) and not all(distilled):
        assert triple.vocabulary == "special"


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_composes(name):
    assert compose("config", [f"machine={name}"]).machine.device


def test_quantisation_is_set_on_the_command_line():
    given = "triple.base.quantization.load_in_4bit=true"
    cfg = compose("config", ["experiment=pocket", given])
    specs = model_specs(cfg)
    assert specs["base"].quantization == {"load_in_4bit": True}
    assert specs["expert"].quantization is None


def test_no_default_model_is_assumed():
    cfg = compose("config", ["experiment=none", "name=x"])
    assert OmegaConf.is_missing(cfg.triple.base, "id")


@pytest.mark.thinned(1)
def test_the_experiment_wins_over_defaults_and_the_command_line_over_both():
    assert compose("config", ["experiment=llama70b_chat"]).triple.base.id.endswith("70b-hf")
    overridden = compose("config", ["experiment=llama70b_chat", "triple=qwen25_7b", "alpha=0.5"])
    assert overridden.triple.base.id == "Qwen/Qwen2.5-7B"
    assert overridden.alpha == 0.5
    one_task = compose("config", ["experiment=llama70b_chat", "task=[triviaqa]"])
    assert list(one_task.task) == ["triviaqa"]


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["experiment=pokcet"], "unknown experiment 'pokcet' (did you mean pocket?)"),
        (["task=[gsm9k]"], "unknown task 'gsm9k' (did you mean gsm8k?); known: alpaca_eval, "),
        (["alhpa=1"], "unknown key 'alhpa' (did you mean alpha?)"),
        (["decoding.bath_size=1"], "unknown key 'bath_size' (did you mean batch_size?)"),
        (["triple.base.di=x"], "unknown key 'di'"),
        (["limit=many"], "limit=many: it must be a whole number"),
        (["task.pocket_gsm8k.pth=x"], "task.pocket_gsm8k has no key 'pth' (did you mean path?)"),
    ],
)
def test_misspelling_is_one_line_that_names_it(overrides, line):
    with pytest.raises(Exception) as caught:
        compose("config", overrides)
    said = explain(caught.value)
    assert line in said
    assert "\n" not in said
