"""What a results folder tells of a run in progress; the folder is read, never written or locked.

The run may go on meanwhile, or have been killed: a half-written last line waits until it is whole.
A folder may be a stranger's, so everything in it is checked before it is used.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.experiment.forecast import Forecast, spoken
from proxytune.experiment.watched_cell import (
    LATEST,
    SILENT,
    CellState,
    Latest,
    WatchedCell,
    scoring_of,
)
from proxytune.files import check_name, check_plain_files, read_json
from proxytune.roles import ORDER


@dataclass(frozen=True)
class RunState:
    """What is shown of a run.

    Attributes:
        name: the run's.
        phase: "generating", "scoring" or "finished".
        since: seconds since the latest session began; None if run.json does not say.
        silent: seconds since the last completion came, or run.json was written.
        left: the seconds that generating will take; None before enough was measured.
        cells: in the order in which they run.
        latest: the newest completions, the newest first.
        report: whether there is a table, so that the report can be shown.
    """

    name: str
    phase: str
    since: float | None
    silent: float
    left: float | None
    cells: list[CellState]
    latest: list[Latest]
    report: bool

    @property
    def said(self) -> str:
        """How the run stands, in a sentence."""
        if self.phase == "finished":
            return "finished"
        done, total = sum(c.done for c in self.cells), sum(c.total for c in self.cells)
        parts = [f"{done:,} of {total:,} examples"]
        parts += [] if self.since is None else [f"{spoken(self.since)} since it was started"]
        if self.phase == "scoring":
            parts.append("all completions are there, and are being scored")
        elif self.left is None:
            parts.append("too little is done for a forecast")
        else:
            parts.append(f"about {spoken(self.left)} left")
        text = "; ".join(parts)
        if self.silent > SILENT:
            text += (
                f". Nothing has come for {spoken(self.silent)}: a model is being loaded or asked "
                "to judge, or the run was stopped; the same command goes on with it"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"said": self.said}


class Watcher:
    """Looks at a results folder again and again; each look reads only what is new.

    Args:
        folder: of a run that has begun.

    Raises:
        UserError: it is no such folder, or holds a symbolic link.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; RUN is the results folder of a run")
        if not (folder / "run.json").is_file():
            points = [
                each.name for each in sorted(folder.iterdir()) if (each / "run.json").is_file()
            ]
            more = f" and {len(points) - 3} more" if len(points) > 3 else ""
            few = f"; watch one of the runs in it: {', '.join(points[:3])}{more}" if points else ""
            raise UserError(f"{folder} has no run.json, so no run has begun in it{few}")
        check_plain_files(folder)
        self.folder = folder
        self._cells: dict[tuple[str, str], WatchedCell] = {}

    def look(self) -> RunState:
        """The state of the run now.

        Raises:
            UserError: run.json is damaged.
            OSError: the folder cannot be read any more.
        """
        now = time.time()
        run = read_json(self.folder / "run.json", config=dict, sessions=list)
        session = run["sessions"][-1] if run["sessions"] else {}
        session = session if isinstance(session, dict) else {}
        cells = [self._cell(*each) for each in _planned(run)]
        for cell in cells:
            cell.look(_begin(session, cell.system, cell.task), now)
        left = _forecast(cells)
        whole = all(cell.total and cell.done >= cell.total for cell in cells)
        phase = "scoring" if whole else "generating"
        changed = [(self.folder / "run.json").stat().st_mtime, *(c.changed for c in cells)]
        started = _seconds(session.get("started"))
        newest = sorted((c for c in cells if c.latest), key=lambda cell: cell.changed)
        return RunState(
            name=str(run.get("name", self.folder.name)),
            phase="finished" if session.get("finished") else phase,
            since=None if started is None else max(0.0, now - started),
            silent=max(0.0, now - max(changed)),
            left=left,
            cells=[cell.state() for cell in cells],
            latest=[each for cell in newest for each in cell.latest][::-1][:LATEST],
            report=(self.folder / "table.csv").is_file(),
        )

    def _cell(self, system: str, task: str, settings: Any) -> WatchedCell:
        if (system, task) not in self._cells:
            scoring = scoring_of(task, settings)
            self._cells[system, task] = WatchedCell(self.folder / task, system, task, scoring)
        return self._cells[system, task]


def _planned(run: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(system, task, the task's settings) of the cells that a run.json names, in their order.

    Raises:
        UserError: it names none.
    """
    config = run["config"]
    systems, tasks = config.get("systems"), config.get("task") or run.get("tasks")
    if not isinstance(systems, list) or not isinstance(tasks, dict):
        raise UserError("run.json names no systems and tasks; this is no results folder of a run")
    for system in sorted({each for each in systems if each in ORDER}, key=ORDER.index):
        for task, settings in tasks.items():
            yield system, check_name("a task of run.json", task), settings


def _begin(session: Mapping[str, Any], system: str, task: str) -> tuple[float, int] | None:
    """When a cell began in the latest session, and how many examples were done before it."""
    noted = session.get("cells")
    found = noted.get(f"{system}/{task}") if isinstance(noted, dict) else None
    if not isinstance(found, dict):
        return None
    began, before = _seconds(found.get("began")), found.get("before")
    return (began, before) if began is not None and isinstance(before, int) else None


def _seconds(text: Any) -> float | None:
    """A time of run.json in seconds since 1970; None for what is no time."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _forecast(cells: Sequence[WatchedCell]) -> float | None:
    """The seconds that are left, by the forecast that the run itself shows."""
    found = Forecast([(cell.system, cell.task, max(cell.total, cell.done)) for cell in cells])
    for index, cell in enumerate(cells):
        before = cell.done if cell.began is None else min(cell.before, cell.done)
        found.finished_before(index, before)
        if cell.began is not None:
            found.begin(index, cell.began)
            for _ in range(cell.done - before):
                found.advance(index, max(cell.began, cell.changed))
    return found.seconds() if all(cell.total for cell in cells) else None
