"""Scoring a part of a results folder again."""

import json
from types import SimpleNamespace
from typing import Any

from proxytune.experiment import runner
from proxytune.experiment.cells import CellScores, TaskCell
from proxytune.files import read_jsonl
from proxytune.records import Decoding, Metric, Score


class ScoredCell(TaskCell):
    def score(self):
        metric = Metric("open", self.system, "true", value=1.0, n=1, n_examples=1)
        return CellScores([metric], [Score("0", {"true": 1.0})])


def cells(folder, judge, systems) -> list[Any]:
    task = SimpleNamespace(judged_by=lambda: judge)
    return [
        ScoredCell(
            task=task,
            task_name="open",
            system=system,
            examples=[],
            decoding=Decoding(),
            folder=folder / "open" / system,
            identity={},
        )
        for system in systems
    ]


def scored(folder, judge, systems) -> set[str]:
    """Scores these systems; returns all whose metrics the folder has then."""
    runner._score(cells(folder, judge, systems), folder)
    return {metric.system for metric in read_jsonl(folder / "metrics.jsonl", Metric)}


def test_systems_that_another_judge_scored_are_left_out(tmp_path, caplog):
    mine, other = {"judge": {"id": "a"}}, {"judge": {"id": "b"}}
    assert scored(tmp_path, mine, ["base", "proxy"]) == {"base", "proxy"}
    assert scored(tmp_path, mine, ["proxy"]) == {"base", "proxy"}
    assert not caplog.text
    assert scored(tmp_path, other, ["proxy"]) == {"proxy"}
    assert "open/base was scored by another judge" in caplog.text
    assert scored(tmp_path, other, ["base"]) == {"base", "proxy"}
    assert json.loads((tmp_path / "open" / "base" / "judges.json").read_text()) == other


def test_without_a_judge_nothing_is_left_out(tmp_path, caplog):
    assert scored(tmp_path, {}, ["base"]) == {"base"}
    assert scored(tmp_path, {}, ["proxy"]) == {"base", "proxy"}
    assert not caplog.text
