"""Tasks as a configuration names them; their classes may be a user's own.

What a class gives is looked at before a model is loaded: a mistake in it would else show after all
completions are generated, or not at all.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from proxytune.config.given import FILES
from proxytune.config.overrides import imported, parameters
from proxytune.errors import UserError, did_you_mean
from proxytune.records import Example, MetricInfo, Prompt, Score

_SHOWN = "; docs/own.md shows a whole task"


def make_task(name: str, node: Any) -> Any:
    """The task of one entry of the configuration.

    Args:
        name: of the entry.
        node: its class (`_target_`) and the settings of that.

    Raises:
        UserError: there is no such class, or it has no such setting.
    """
    file = FILES.get(f"task/{name}", f"conf/task/{name}.yaml")
    if not isinstance(node, DictConfig) or not node.get("_target_"):
        raise UserError(
            f"task {name}: in a task's file the settings stand under the task's name, with "
            f"_target_: MODULE.CLASS among them{_SHOWN}"
        )
    try:
        imported(node["_target_"])
        known = parameters(node)
        unknown = [str(key) for key in node if key != "_target_" and key not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known)
            raise UserError(
                f"there is no setting {unknown[0]!r}{hint}; known: {', '.join(known) or 'none'}"
            )
        task = instantiate(node, _convert_="all")
    except (InstantiationException, UserError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        reason = str(cause).splitlines()[0]
        raise UserError(f"task {name}: {reason}; its keys stand in {file}") from error
    lacking = [
        each for each in ("runs_itself", "name", "metrics", "decoding") if _lacks(task, each)
    ]
    if lacking:
        raise UserError(
            f"task {name}: {type(task).__name__} has no {lacking[0]}; it inherits from "
            f"tasks.base.Task, and sets name, metrics and decoding{_SHOWN}"
        )
    return task


def _lacks(task: Any, name: str) -> bool:
    """Whether a task lacks what the run will ask for."""
    asked_by_us = name == "runs_itself" or not getattr(task, "runs_itself", True)
    return asked_by_us and not hasattr(task, name)


def check_examples(name: str, examples: Sequence[Any]) -> None:
    """Refuses what `Task.examples` should not give.

    Args:
        name: of the task.
        examples: what it gave.

    Raises:
        UserError: there are none, one is no `Example`, or two have the same id.
    """
    if not examples:
        raise UserError(f"task {name} has no examples; look at its data (task.{name}.path)")
    for each in examples:
        if not isinstance(each, Example) or not isinstance(each.prompt, Prompt):
            raise UserError(
                f"task {name}: examples() gives Example(id, Prompt(raw=..., user=...)) of "
                f"proxytune.records, not {each!r:.200}"
            )
        if not isinstance(each.id, str) or not each.id:
            raise UserError(
                f"task {name}: an example's id is a text that is not empty, not {each.id!r}; "
                "str(...) makes one"
            )
    (most, times), *_ = Counter(each.id for each in examples).most_common(1)
    if times > 1:
        raise UserError(f"task {name}: {times} examples have the id {most!r}; each needs its own")


def check_scores(name: str, infos: Mapping[str, MetricInfo], scores: Sequence[Any]) -> None:
    """Refuses what `Task.score` should not give.

    Args:
        name: of the task.
        infos: its metrics.
        scores: what it gave.

    Raises:
        UserError: one is no `Score`, or has a value that its metric cannot have.
    """
    for score in scores:
        if not isinstance(score, Score):
            raise UserError(
                f"task {name}: score() gives a Score of proxytune.records, not {score!r:.200}"
            )
        for metric, value in score.values.items():
            reason = _misfit(value, infos.get(metric))
            if reason:
                raise UserError(f"task {name}: score() gives {metric}={value!r}; {reason}")


def _misfit(value: Any, info: MetricInfo | None) -> str | None:
    """Why a metric cannot have a value; None if it can."""
    if info is None:
        return "the task's class has no such metric; `metrics` names them"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "a value is a finite number (float(...)), or None, which leaves the example out"
    if info.percent and not 0 <= value <= 1:
        return "it is shown in percent, so it lies in 0..1; MetricInfo(..., percent=False) is not"
    return None
