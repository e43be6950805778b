"""Experiment tracking with Weights & Biases; no other module imports wandb.

The runner sends its measurements to a tracker and never reads them back, so no result depends on
tracking. If wandb fails, the tracker logs one warning and stops; the run goes on.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.errors import UserError
from proxytune.files import read_rows
from proxytune.records import Metric
from proxytune.roles import COMPARED

log = logging.getLogger(__name__)

KINDS = ("disabled", "wandb")


class Tracker:
    """The interface of a tracker. This one, the default, tracks nothing."""

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Logs every metric of the run under "task/system/metric"."""

    def log_table(self, table: pd.DataFrame) -> None:
        """Logs the comparison table (`results.comparison.comparison`)."""

    def log_completions(self, table: Callable[[], pd.DataFrame]) -> None:
        """Logs sample completions, the systems side by side (`sample_completions`).

        Args:
            table: makes the table; called only where it is logged.
        """

    def log_throughput(self, throughput: Mapping[str, Mapping[str, float]]) -> None:
        """Logs how much was generated: "system/task" -> tokens and seconds."""

    def finish(self) -> None:
        """Ends the tracked run; later calls do nothing."""


class WandbTracker(Tracker):
    """Tracks with Weights & Biases.

    Args:
        project, entity: where the run is stored; an entity of None is the user's default.
        experiment: the run's name, and the group that collects its repetitions.
        mode: "online", or "offline" (files under `directory`, for `wandb sync`).
        config: the resolved configuration.
        directory: the results folder.
    """

    def __init__(
        self,
        project: str,
        entity: str | None,
        experiment: str,
        mode: str,
        config: Mapping[str, Any],
        directory: Path,
    ) -> None:
        self._run: Any = None

        def start() -> None:
            import wandb

            self._run = wandb.init(
                project=project,
                entity=entity,
                group=experiment,
                name=experiment,
                mode="offline" if mode == "offline" else "online",
                config=dict(config),
                dir=str(directory),
                settings=wandb.Settings(console="off", quiet=True),
            )

        self._guard("start", start)

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Logs every metric under "task/system/metric", with the ends of its 95 % interval."""
        values: dict[str, float] = {}
        for m in metrics:
            name = f"{m.task}/{m.system}/{m.metric}"
            values[name] = m.value
            if m.ci_low is not None and m.ci_high is not None:
                values[f"{name}_low"], values[f"{name}_high"] = m.ci_low, m.ci_high
        self._log("metrics", lambda: values)

    def log_table(self, table: pd.DataFrame) -> None:
        """Logs the comparison table."""
        self._log("comparison", lambda: {"comparison": _wandb_table(table)})

    def log_completions(self, table: Callable[[], pd.DataFrame]) -> None:
        """Logs sample completions, the systems side by side."""
        self._log("completions", lambda: {"completions": _wandb_table(table())})

    def log_throughput(self, throughput: Mapping[str, Mapping[str, float]]) -> None:
        """Logs tokens, seconds and tokens per second of every (system, task) that generated."""
        values = {}
        for cell, spent in throughput.items():
            values |= {f"throughput/{cell}/{key}": value for key, value in spent.items()}
            if spent.get("seconds"):
                rate = spent.get("tokens", 0) / spent["seconds"]
                values[f"throughput/{cell}/tokens_per_second"] = rate
        self._log("throughput", lambda: values)

    def finish(self) -> None:
        """Ends the run. wandb's own process may still be writing an offline run's records."""
        if self._run is not None:
            self._guard("finish", self._run.finish)
            self._run = None

    def _log(self, what: str, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is not None:
            self._guard(what, lambda: self._run.log(dict(values())))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Calls wandb. An exception of any kind ends the tracking and is not raised further."""
        try:
            action()
        except Exception as error:
            log.warning("tracking stopped: wandb could not %s: %s", what, error)
            self._run = None


def make_tracker(
    kind: str,
    project: str,
    experiment: str,
    mode: str,
    config: Mapping[str, Any],
    directory: Path,
    entity: str | None = None,
) -> Tracker:
    """Makes the tracker that a configuration asks for.

    Raises:
        UserError: an unknown kind or mode.
    """
    if kind not in KINDS:
        raise UserError(f"tracking.kind={kind} is none of {', '.join(KINDS)}")
    if mode not in ("online", "offline"):
        raise UserError(f"tracking.mode={mode} is neither online nor offline")
    if kind == "disabled":
        return Tracker()
    return WandbTracker(project, entity, experiment, mode, config, directory)


def sample_completions(folder: Path, tasks: Sequence[str], per_task: int = 50) -> pd.DataFrame:
    """The first examples of each task with each system's completion and first score.

    Args:
        folder: a results folder.
        tasks: the tasks whose folders are read.
        per_task: number of examples of each task.
    """
    rows = []
    for task in tasks:
        examples = _first_lines(folder / task / "examples.jsonl", per_task)
        by_id = {
            e["id"]: {
                "task": task,
                "id": e["id"],
                "prompt": e["prompt"]["raw"],
                "target": str(e.get("target")),
            }
            for e in examples
        }
        for system in COMPARED:
            missing = set(by_id)
            for line in read_rows(folder / task / system / "completions.jsonl"):
                if not missing:
                    break  # the file of a long run is large: read no further than needed
                if line["example_id"] in missing and line["sample"] == 0:
                    by_id[line["example_id"]][system] = line["text"]
                    missing.discard(line["example_id"])
            for line in read_rows(folder / task / system / "scores.jsonl"):
                values = list(line["values"].values())
                if line["example_id"] in by_id and values:
                    by_id[line["example_id"]][f"{system}_score"] = values[0]
        rows += by_id.values()
    return pd.DataFrame([{k: _text(v) for k, v in row.items()} for row in rows])


def _text(value: Any) -> Any:
    """Replaces lone surrogates: a model may write them, and pandas and wandb reject them."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


def _first_lines(path: Path, count: int) -> list[Any]:
    return [line for line, _ in zip(read_rows(path), range(count), strict=False)]


def _wandb_table(table: pd.DataFrame) -> Any:
    import wandb

    data: Any = [[_plain(value) for value in row] for row in table.to_numpy(dtype=object).tolist()]
    return wandb.Table(columns=[str(c) for c in table.columns], data=data, allow_mixed_types=True)


def _plain(value: Any) -> Any:
    """A table's cell for wandb, which takes None for a missing value."""
    missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def logged_in() -> bool:
    """Whether wandb has an API key; the user is not asked for one."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
