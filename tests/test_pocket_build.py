"""How the pocket family's figures are asked for and written down; nothing is trained here."""

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from proxytune.config.schema import register
from proxytune.files import ROOT, write_jsonl
from proxytune.records import MetricInfo, Score
from proxytune.results import stats
from proxytune.results.folder import build_table
from scripts.pocket import build, experts
from tests.tiny import tiny_model, tiny_tokenizer

WORK = Path("work")


def composed(words):
    """The configuration of `run.py` with these words."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(words))


@pytest.fixture
def asked(monkeypatch):
    """What `measure` is asked for, instead of a run: (output, settings)."""
    found = []
    monkeypatch.setattr(build, "measure", lambda *given: found.append(given[::2]) or [])
    return found


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.slow
def test_both_experiments_read_one_split_and_one_seeds_models(split, asked):
    build.evaluate(WORK, 2, split)
    for _, settings in asked:
        cfg = composed(settings)
        for name, task in cfg.task.items():
            assert f"/pocket/data/{split}" in task.path, name
        roles = [cfg.triple.expert.id] + ([cfg.triple.tuned.id] if len(cfg.task) > 1 else [])
        assert all(role.startswith("work/seed2/") for role in roles)
        for judge in ("truth_judge", "info_judge"):
            if "pocket_truthfulqa_open" in cfg.task:
                path = cfg.task.pocket_truthfulqa_open[judge].path
                assert f"/pocket/data/{split}" in path
    assert {name for _, s in asked for name in composed(s).task} == {
        f"pocket_{task}" for task in build.TASKS
    }


@pytest.mark.slow
def test_the_other_experts_runs_take_one_seeds_models(asked):
    runs = [*experts.comparisons(3, WORK / "seed3"), next(experts.knobs(WORK))]
    for run in runs:
        run.figures(WORK)
    configs = {run.name: composed(settings) for run, (_, settings) in zip(runs, asked, strict=True)}
    pairs = configs["both skills 0.5"].triple.pairs
    assert {each.expert.id for each in pairs.values()} == {
        f"work/seed3/expert_{skill}" for skill in experts.SKILLS
    }
    assert configs["thinking"].triple.expert.format.think_end == "</think>"
    assert configs["gated 0.4"].formula.threshold == 0.4
    for name, cfg in configs.items():
        split = "dev" if name.startswith("alpha") else "test"
        assert all(f"/pocket/data/{split}/" in task.path for task in cfg.task.values())


def test_figures_are_shares_with_intervals_and_the_gap_is_a_system(tmp_path, monkeypatch):
    right = {"base": 4, "expert": 10, "proxy": 12, "tuned": 14}
    metrics = []
    for system, n in right.items():
        scores = [Score(str(i), {"acc": float(i < n)}) for i in range(20)]
        write_jsonl(tmp_path / "gsm8k" / system / "scores.jsonl", scores)
        metrics += stats.metrics("gsm8k", system, scores)
    write_jsonl(tmp_path / "metrics.jsonl", metrics)
    build_table(tmp_path, metrics, {"gsm8k": {"acc": MetricInfo("accuracy")}})
    monkeypatch.setattr(build, "_run", lambda *_: None)
    build.write_figures(tmp_path / "figures.csv", build.measure(tmp_path, 1, []))
    with (tmp_path / "figures.csv").open() as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {*right, build.GAP}
    proxy, gap = rows["proxy"], rows[build.GAP]
    assert (proxy["value"], proxy["n"], proxy["seed"]) == ("0.6", "20", "1")
    assert float(proxy["low"]) < 0.6 < float(proxy["high"])
    assert gap["value"] == "0.8" and float(gap["low"]) < 0.8 < float(gap["high"])


@pytest.mark.parametrize("offline", [True, False])
def test_what_ships_does_not_depend_on_the_time_or_on_the_network(tmp_path, monkeypatch, offline):
    assert not [*(ROOT / "pocket" / "models").glob("*/train.json")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    source = tmp_path / "source"
    tiny_model(seed=0).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "train.json").write_text("{}")
    build.ship(source, tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "train.json").exists()
    config = json.loads((tmp_path / "shipped" / "tokenizer_config.json").read_text())
    assert config["local_files_only"] is False
