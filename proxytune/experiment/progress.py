"""What a run shows while it generates: bars on a terminal, else a line a minute in the log."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from proxytune.experiment.forecast import Forecast, spoken

log = logging.getLogger(__name__)

_EVERY = 60.0  # seconds between two lines where there is no terminal,
_EVERY_BAR = 0.5  # and between two forecasts where there is one
_LONG = 5.0  # a loading of so many seconds is worth a line


class CellProgress:
    """The progress of one (system, task); its bar appears with the cell's first tokens."""

    def __init__(self, run: "RunProgress", index: int, system: str, task: str, total: int) -> None:
        self.name = f"{system:<10} {task}"
        self.total = total
        self.examples = 0
        self._run = run
        self._index = index
        self._bar = run.bars.add_task(
            self.name, total=total, visible=False, start=False, tokens="", left=""
        )
        self._tokens = 0
        self._begun: float | None = None

    def done(self, examples: int) -> None:
        """Shows how many examples an earlier session finished."""
        self.examples = examples
        self._run.bars.update(self._bar, completed=examples)
        self._run.forecast.finished_before(self._index, examples)

    def begin(self) -> None:
        """Notes that the cell begins now."""
        self._begun = self._run.clock()
        self._run.forecast.begin(self._index, self._begun)

    def tokens(self, count: int) -> None:
        """Counts generated tokens for the speed column."""
        self._run.bars.start_task(self._bar)
        self._tokens += count
        self._run.bars.update(self._bar, visible=True, tokens=self.speed)

    def advance(self) -> None:
        """Counts one more example that has all its samples."""
        self.examples += 1
        self._run.bars.advance(self._bar)
        self._run.advance(self._index, self)

    @property
    def speed(self) -> str:
        """Tokens and tokens per second of this session; "" for a cell that counts none."""
        if not self._tokens:
            return ""
        seconds = self._run.clock() - (self._begun or 0.0)
        speed = f", {self._tokens / seconds:,.0f}/s" if self._begun is not None and seconds else ""
        return f"{self._tokens:,} tokens{speed}"


class RunProgress:
    """The progress of a whole run.

    Args:
        cells: (system, task, number of examples) of each.
        bars: where the bars are drawn.
        terminal: whether somebody sees the bars; if not, the log gets lines.
        clock: tells the time in seconds.

    Attributes:
        cells: the progress of each, in the order given.
    """

    def __init__(
        self,
        cells: Sequence[tuple[str, str, int]],
        bars: Progress,
        *,
        terminal: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bars = bars
        self.clock = clock
        self.forecast = Forecast(cells)
        self._terminal = terminal
        self._last_shown = clock()
        self.cells = [CellProgress(self, index, *cell) for index, cell in enumerate(cells)]
        self._loading: TaskID = bars.add_task("", visible=False, total=None, tokens="", left="")
        self._all: TaskID | None = None

    @contextmanager
    def loading(self, system: str) -> Iterator[None]:
        """Shows that a system's models are being loaded, and for how long."""
        begun = self.clock()
        self.bars.reset(self._loading, description=f"{system:<10} loading", visible=True)
        if not self._terminal:
            log.info("%s: loading its models", system)
        try:
            yield
        finally:
            self.bars.update(self._loading, visible=False)
        if not self._terminal and self.clock() - begun >= _LONG:
            log.info("%s: loaded in %s", system, spoken(self.clock() - begun))

    def advance(self, index: int, cell: CellProgress) -> None:
        """Notes that an example of a cell has ended."""
        now = self.clock()
        self.forecast.advance(index, now)
        every = _EVERY_BAR if self._terminal else _EVERY
        if now - self._last_shown < every and cell.examples < cell.total:
            return  # a forecast takes longer than an example of a small model
        self._last_shown = now
        left = self.forecast.seconds()
        said = f"about {spoken(left)} left" if left is not None and self.forecast.left else ""
        if self._terminal:
            self._show_all(said)
        else:
            facts = [f"{cell.examples:,} of {cell.total:,} examples", cell.speed]
            facts.append(f"the run: {self.forecast.left:,} examples, {said}" if said else "")
            log.info("%s: %s", " ".join(cell.name.split()), "; ".join(filter(None, facts)))

    def _show_all(self, said: str) -> None:
        if len(self.cells) == 1:
            return
        total, done = (sum(getattr(c, name) for c in self.cells) for name in ("total", "examples"))
        if self._all is None:
            self._all = self.bars.add_task("the run", total=total, tokens="", left="")
        self.bars.update(self._all, completed=done, left=said)


@contextmanager
def generation_progress(cells: Sequence[tuple[str, str, int]]) -> Iterator[RunProgress]:
    """Shows a run's progress while the block runs.

    Args:
        cells: (system, task, number of examples) of each.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:>20}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        yield RunProgress(cells, bars, terminal=console.is_terminal)
