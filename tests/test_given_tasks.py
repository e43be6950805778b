"""What a task's class gives, which may be a user's own, is looked at before a model is loaded."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from proxytune.errors import UserError
from proxytune.experiment.given_tasks import check_examples, check_scores, make_task
from proxytune.records import Decoding, Example, MetricInfo, Prompt, Score
from tasks.base import Task

INFOS = {"acc": MetricInfo("accuracy"), "length": MetricInfo("characters", percent=False)}


@dataclass(frozen=True)
class Mine(Task):
    name = "mine"
    metrics: ClassVar[dict[str, MetricInfo]] = INFOS
    path: str = ""
    decoding: Decoding = Decoding(max_new_tokens=8)

    def examples(self):
        return []

    def score(self, example, texts):
        return Score(example.id, {"acc": 1.0})


@dataclass
class Other:
    path: str = ""


def node(**settings: Any) -> Any:
    return OmegaConf.create({"_target_": "tests.test_given_tasks.Mine", **settings})


def test_a_task_is_made_of_its_settings():
    task = make_task("mine", node(path="x", decoding={"max_new_tokens": 3}))
    assert task.path == "x" and task.decoding.max_new_tokens == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            node(pth="x"),
            r"no setting 'pth' \(did you mean path\?\); known: path",
        ),
        (node(decoding={"max_new_token": 3}), "decoding has no setting 'max_new_token'"),
        (node(_target_="tests.test_given_tasks.Mien"), "no attribute 'Mien'"),
        (node(_target_="nowhere.Mine"), "No module named 'nowhere'"),
        (
            node(_target_="tests.test_given_tasks.Other"),
            "Other has no runs_itself; it inherits",
        ),
        ("tests.test_given_tasks.Mine", "the settings stand under the task's name"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(given, words):
    with pytest.raises(UserError, match=f"task mine: .*{words}"):
        make_task("mine", given)


def example(id: Any = "1", prompt: Any = None) -> Example:
    return Example(id, prompt or Prompt(raw="q", user="q"))


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "task mine has no examples"),
        ([example(0)], "an example's id is a text that is not empty, not 0"),
        ([example("")], "not ''"),
        ([example("1", "a prompt")], "examples\\(\\) gives Example"),
        ([{"id": "1"}], "not {'id': '1'}"),
        ([example("a"), example("b"), example("a")], "2 examples have the id 'a'"),
    ],
)
def test_examples_of_another_form_are_refused(examples, words):
    check_examples("mine", [example("a"), example("b")])
    with pytest.raises(UserError, match=words):
        check_examples("mine", examples)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (None, "score\\(\\) gives a Score of proxytune.records, not None"),
        (Score("1", {"accuracy": 1.0}), "accuracy=1.0; the task's class has no such metric"),
        (Score("1", {"acc": True}), "acc=True; a value is a finite number"),
        (Score("1", {"acc": float("nan")}), "acc=nan; a value is a finite number"),
        (Score("1", {"acc": 80.0}), "acc=80.0; it is shown in percent, so it lies in 0..1"),
    ],
)
def test_scores_of_another_form_are_refused(score, words):
    check_scores("mine", INFOS, [Score("1", {"acc": 1, "length": 80.0}), Score("2", {"acc": None})])
    with pytest.raises(UserError, match=words):
        check_scores("mine", INFOS, [score])
