"""Experiment tracking, the only importer of wandb.

The runner tells a tracker what it has measured; nothing reads anything back from it, so no number
depends on it. A tracker that fails says so once and is silent from then on: a run is never lost to
its tracking.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.records import Metric

log = logging.getLogger(__name__)

KINDS = ("disabled", "wandb")
SYSTEMS = ("base", "expert", "proxy", "tuned")


class Tracker:
    """Tracks nothing: the default, and the interface."""

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Every metric of the run, under task/system/metric."""

    def log_table(self, table: pd.DataFrame) -> None:
        """The comparison table (`comparison.comparison`)."""

    def log_completions(self, table: pd.DataFrame) -> None:
        """Sample completions, the systems side by side (`sample_completions`)."""

    def log_throughput(self, throughput: Mapping[str, Mapping[str, float]]) -> None:
        """What generation took: "system/task" -> tokens and seconds."""

    def finish(self) -> None:
        """Ends the tracked run; further calls do nothing."""


class WandbTracker(Tracker):
    """Tracks with Weights & Biases.

    Args:
        project, entity: where the run goes; an entity of None is the user's own.
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
        """Every metric of the run, under task/system/metric, with its interval."""
        values: dict[str, float] = {}
        for m in metrics:
            name = f"{m.task}/{m.system}/{m.metric}"
            values[name] = m.value
            if m.ci_low is not None and m.ci_high is not None:
                values[f"{name}_low"], values[f"{name}_high"] = m.ci_low, m.ci_high
        self._log("metrics", lambda: values)

    def log_table(self, table: pd.DataFrame) -> None:
        """The comparison table."""
        self._log("comparison", lambda: {"comparison": _wandb_table(table)})

    def log_completions(self, table: pd.DataFrame) -> None:
        """Sample completions, side by side."""
        self._log("completions", lambda: {"completions": _wandb_table(table)})

    def log_throughput(self, throughput: Mapping[str, Mapping[str, float]]) -> None:
        """Tokens, seconds, and tokens per second of every cell that generated."""
        values = {}
        for cell, spent in throughput.items():
            values |= {f"throughput/{cell}/{key}": value for key, value in spent.items()}
            if spent.get("seconds"):
                rate = spent.get("tokens", 0) / spent["seconds"]
                values[f"throughput/{cell}/tokens_per_second"] = rate
        self._log("throughput", lambda: values)

    def finish(self) -> None:
        """Closes the run; wandb's own process may still be writing an offline run's records."""
        if self._run is not None:
            self._guard("finish", self._run.finish)
            self._run = None

    def _log(self, what: str, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is not None:
            self._guard(what, lambda: self._run.log(dict(values())))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Runs a call into wandb; whatever it raises ends the tracking, never the run."""
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
    """The tracker that a configuration asks for.

    Raises:
        ValueError: an unknown kind or mode.
    """
    if kind not in KINDS:
        raise ValueError(f"tracking.kind={kind} is none of {', '.join(KINDS)}")
    if mode not in ("online", "offline"):
        raise ValueError(f"tracking.mode={mode} is neither online nor offline")
    if kind == "disabled":
        return Tracker()
    return WandbTracker(project, entity, experiment, mode, config, directory)


def sample_completions(folder: Path, tasks: Sequence[str], per_task: int = 50) -> pd.DataFrame:
    """The first examples of each task with every system's completion and its headline's value.

    Args:
        folder: a results folder.
        tasks: which tasks' folders to read.
        per_task: examples of each.
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
        for system in SYSTEMS:
            missing = set(by_id)
            for line in _lines(folder / task / system / "completions.jsonl"):
                if not missing:
                    break  # a long run's file is not read to its end
                if line["example_id"] in missing and line["sample"] == 0:
                    by_id[line["example_id"]][system] = line["text"]
                    missing.discard(line["example_id"])
            for line in _lines(folder / task / system / "scores.jsonl"):
                values = list(line["values"].values())
                if line["example_id"] in by_id and values:
                    by_id[line["example_id"]][f"{system}_score"] = values[0]
        rows += by_id.values()
    return pd.DataFrame([{k: _text(v) for k, v in row.items()} for row in rows])


def _text(value: Any) -> Any:
    """Text without lone surrogates, which a model may write and neither pandas nor wandb takes."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


def _lines(path: Path) -> Any:
    if path.exists():
        with path.open(encoding="utf-8", errors="surrogatepass") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def _first_lines(path: Path, count: int) -> list[Any]:
    return [line for line, _ in zip(_lines(path), range(count), strict=False)]


def _wandb_table(table: pd.DataFrame) -> Any:
    import wandb

    data: Any = [[_plain(value) for value in row] for row in table.to_numpy(dtype=object).tolist()]
    return wandb.Table(columns=[str(c) for c in table.columns], data=data, allow_mixed_types=True)


def _plain(value: Any) -> Any:
    """A cell as wandb takes it: a missing value is None."""
    missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def logged_in() -> bool:
    """Whether wandb knows an API key; it asks nobody for one."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
