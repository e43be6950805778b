"""The progress bars of a run: one line for each (system, task), with its speed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class CellProgress:
    """The bar of one (system, task); it appears with the cell's first tokens."""

    def __init__(self, bars: Progress, system: str, task: str, total: int) -> None:
        self._bars = bars
        self._bar = bars.add_task(
            f"{system:<10} {task}", total=total, visible=False, start=False, tokens=0
        )
        self._tokens = 0

    def done(self, examples: int) -> None:
        """Shows how many examples an earlier session finished."""
        self._bars.update(self._bar, completed=examples)

    def tokens(self, count: int) -> None:
        """Counts generated tokens for the speed column."""
        self._bars.start_task(self._bar)
        self._tokens += count
        self._bars.update(self._bar, visible=True, tokens=self._tokens)

    def advance(self) -> None:
        """Counts one more example that has all its samples."""
        self._bars.advance(self._bar)


@contextmanager
def generation_progress(cells: Sequence[tuple[str, str, int]]) -> Iterator[list[CellProgress]]:
    """Shows a bar for each cell while the block runs.

    Args:
        cells: (system, task, number of examples) of each.

    Yields:
        The bars, in the order of `cells`.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:>8,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield [CellProgress(bars, system, task, total) for system, task, total in cells]
