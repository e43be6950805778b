"""A results folder made before the rooms of proxytune/ existed is resumed and scored again.

tests/golden/run_538a493 was made at that commit by

    python run.py limit=2 task=[pocket_gsm8k,pocket_truthfulqa_mc] systems=[expert,proxy] \\
        task.pocket_truthfulqa_mc.decoding.max_new_tokens=4

on the pocket family's second edition, with its paths made up and its sessions left out. That commit
knew letters and one headline only (`answers=letter`, `headline=acc_valid`).
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from proxytune import cli
from proxytune.files import ROOT
from proxytune.provenance import weights_fingerprint

OLD = Path(__file__).parent / "golden" / "run_538a493"
# a part of what the same command wrote with the pocket family's first edition (1197758)
FIRST_EDITION = Path(__file__).parent / "golden" / "run_first_edition"
TASKS = ("pocket_gsm8k", "pocket_truthfulqa_mc")
SYSTEMS = ("expert", "proxy")


@pytest.fixture
def folder(tmp_path) -> Path:
    cell = json.loads((OLD / TASKS[0] / "proxy" / "cell.json").read_text())
    if cell["members"]["base"]["weights"] != weights_fingerprint(str(ROOT / "pocket/models/base")):
        pytest.skip("the pocket models are another edition than the folder's")
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def run(monkeypatch, folder: Path, *words: str) -> None:
    settings = [f"task=[{','.join(TASKS)}]", f"systems=[{','.join(SYSTEMS)}]", "report=false"]
    known = ("answers=letter", "headline=acc_valid")
    settings += [f"task.pocket_truthfulqa_mc.{setting}" for setting in known]
    arguments = ["run.py", *settings, f"output_dir={folder}", *words]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.run()


@pytest.mark.slow
def test_it_is_scored_again_to_the_same_scores(folder, monkeypatch):
    for path in folder.rglob("scores.jsonl"):
        path.unlink()
    run(monkeypatch, folder, "limit=2", "stage=score")
    for task in TASKS:
        for system in SYSTEMS:
            name = Path(task) / system / "scores.jsonl"
            assert (folder / name).read_bytes() == (OLD / name).read_bytes()
    assert (folder / "metrics.jsonl").read_bytes() == (OLD / "metrics.jsonl").read_bytes()
    assert (folder / "table.csv").read_bytes() == (OLD / "table.csv").read_bytes()


@pytest.mark.slow
def test_it_keeps_the_stop_strings_that_it_was_begun_with(folder, monkeypatch):
    """GSM8K's have changed since (docs/log.md): completions made with both are never mixed."""
    cells = sorted((folder / TASKS[0]).glob("*/cell.json"))
    shutil.rmtree(cells[0].parent)
    run(monkeypatch, folder, "limit=1", "stage=generate")
    stops = [json.loads(cell.read_text())["decoding"]["stop"] for cell in cells]
    assert stops == [["Answer the following question", "Question:", "Comment:"]] * 2


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(folder, monkeypatch):
    path = folder / TASKS[0] / "proxy" / "completions.jsonl"
    stored = path.read_text().splitlines()
    path.write_text(stored[0] + "\n")  # the second comes back as it was, and a third
    run(monkeypatch, folder, "limit=3")
    lines = path.read_text().splitlines()
    assert lines[0] == stored[0] and len(lines) == 3
    again = {each["example_id"]: each for each in map(json.loads, lines)}[
        json.loads(stored[1])["example_id"]
    ]
    assert again == json.loads(stored[1])


@pytest.mark.thinned(1)
@pytest.mark.parametrize("stage", ["all", "generate", "score"])
def test_a_folder_of_the_first_edition_is_refused(stage, tmp_path, monkeypatch, capsys):
    """GSM8K's examples are the same in both editions, and so are the names of the models."""
    folder = Path(shutil.copytree(FIRST_EDITION, tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "limit=2", f"stage={stage}", "systems=[expert]")
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "pocket_gsm8k/expert holds completions of another configuration" in said
    assert "members.base.weights: 657966e9" in said and "output_dir=" in said
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_neutral_settings_that_it_does_not_know_change_nothing(folder, monkeypatch, capsys):
    """min_p, the penalties and ignore_eos came later; other values are another configuration."""
    neutral = [f"decoding.{name}_penalty=0" for name in ("presence", "frequency")]
    neutral += ["decoding.min_p=0", "decoding.repetition_penalty=1", "decoding.ignore_eos=false"]
    run(monkeypatch, folder, "limit=2", "stage=score", *neutral)
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "limit=2", "decoding.frequency_penalty=0.5")
    assert "decoding.frequency_penalty: None -> 0.5" in capsys.readouterr().err
