"""The progress bars of a run: one line a system and task, with its speed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class GenerationProgress:
    """Bars of the (system, task) cells; a bar appears when its cell starts."""

    def __init__(self, bars: Progress, cells: Sequence[tuple[str, str, int]]) -> None:
        self._bars = bars
        self._ids: dict[tuple[str, str], TaskID] = {
            (system, task): bars.add_task(
                f"{system:<10} {task}", total=total, visible=False, start=False, tokens=0
            )
            for system, task, total in cells
        }
        self._tokens = dict.fromkeys(self._ids, 0)

    def done(self, system: str, task: str, examples: int) -> None:
        """Shows what an earlier session finished."""
        self._bars.update(self._ids[system, task], completed=examples)

    def tokens(self, system: str, task: str, count: int) -> None:
        """Counts generated tokens for the speed column."""
        bar = self._ids[system, task]
        self._bars.start_task(bar)
        self._tokens[system, task] += count
        self._bars.update(bar, visible=True, tokens=self._tokens[system, task])

    def advance(self, system: str, task: str) -> None:
        """One more example has all its samples."""
        self._bars.advance(self._ids[system, task])


@contextmanager
def generation_progress(cells: Sequence[tuple[str, str, int]]) -> Iterator[GenerationProgress]:
    """Shows bars for cells of (system, task, examples) while the block runs."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:>8,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield GenerationProgress(bars, cells)
