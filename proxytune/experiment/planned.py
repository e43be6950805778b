"""The cells that a configuration asks for, and the decoding of each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import DictConfig

from proxytune import provenance
from proxytune.config.formulas import gates
from proxytune.config.schema import DecodingConfig
from proxytune.errors import UserError
from proxytune.experiment.cells import Cell, HarnessCell, TaskCell
from proxytune.experiment.given_tasks import check_examples, check_scores
from proxytune.experiment.identity import decoding_identity, system_identity
from proxytune.files import read_json, write_jsonl
from proxytune.records import Decoding
from proxytune.roles import ORDER

log = logging.getLogger(__name__)

# Settings of a task's `Decoding` that the command line may change.
DECODING_OVERRIDES = tuple(
    field.name for field in fields(Decoding) if field.name in DecodingConfig.__dataclass_fields__
)


def make_cells(
    cfg: DictConfig, tasks: Mapping[str, Any], output: Path, sweep: Path | None = None
) -> list[Cell]:
    """Every cell of a run: task by task, systems in the order in which they share models.

    Args:
        cfg: a resolved `RunConfig`.
        tasks: name -> benchmark.
        output: the results folder; the examples are written to it.
        sweep: the folder of the sweep's points, where the run is one of them.

    Raises:
        UserError: a dataset cannot be had, or two of its examples have the same id.
    """
    cells: list[Cell] = []
    for name, task in tasks.items():
        make = _harness_cells if task.runs_itself else _task_cells
        cells += make(cfg, name, task, output / name)
    for cell in cells:
        cell.sweep = sweep
    return cells


def decoding_of(cfg: DictConfig, task: Any) -> Decoding:
    """A task's own settings of decoding, with those of the command line in their place.

    Raises:
        UserError: an impossible value.
    """
    overrides = {k: cfg.decoding[k] for k in DECODING_OVERRIDES if cfg.decoding[k] is not None}
    return replace(task.decoding, **overrides)


def _task_cells(cfg: DictConfig, name: str, task: Any, folder: Path) -> list[TaskCell]:
    try:
        examples = task.examples()
    except UserError as error:
        other = f"; task.{name}.path=FILE names another" if getattr(task, "path", None) else ""
        raise UserError(f"task {name}: {error}{other}") from error
    check_examples(name, examples)
    dataset = {"sha256": provenance.dataset_sha256(examples), "examples": len(examples)}
    other = task.other_dataset(examples)
    if other:
        log.warning("%s is not the paper's dataset: %s", name, other)
    decoding = _as_begun(decoding_of(cfg, task), task, folder)
    asked = examples[: cfg.limit]
    if cfg.stage != "generate" and task.scores_texts_alone():
        # a mistake in the task's class shows now, not after hours of generation
        check_scores(name, task.metrics, task.score_all(asked[:1], [[""] * decoding.n]))
    write_jsonl(folder / "examples.jsonl", asked)
    return [
        TaskCell(
            task=task,
            task_name=name,
            system=system,
            folder=folder / system,
            identity={"dataset": dataset}
            | system_identity(cfg, system)
            | {"decoding": decoding_identity(decoding, cfg.decoding.seed)},
            examples=asked,
            decoding=decoding,
            gated=gates(cfg),
            mapped=cfg.triple.vocabulary == "map",
            other_dataset=other,
        )
        for system in _in_order(cfg.systems)
    ]


class _Begun(TypedDict, total=False):
    """What is read of a cell's stored decoding."""

    stop: list[str]


def _as_begun(decoding: Decoding, task: Any, folder: Path) -> Decoding:
    """The decoding; with a task's former stop strings in a folder that was begun with them."""
    begun = [
        tuple(read_json(path, decoding=_Begun)["decoding"].get("stop", ()))
        for path in sorted(folder.glob("*/cell.json"))
    ]
    own = decoding.stop == type(task).decoding.stop  # and not the user's
    former = next((stop for stop in begun if own and stop in task.former_stops), None)
    return decoding if former is None else replace(decoding, stop=former)


def _harness_cells(cfg: DictConfig, name: str, task: Any, folder: Path) -> list[HarnessCell]:
    seed = {"seed": cfg.decoding.seed}
    return [
        HarnessCell(
            task=task,
            task_name=name,
            system=system,
            folder=folder / system,
            identity=task.identity() | seed | system_identity(cfg, system),
            limit=cfg.limit,
        )
        for system in _in_order(cfg.systems)
    ]


def _in_order(systems: Sequence[str]) -> list[str]:
    return sorted(systems, key=ORDER.index)
