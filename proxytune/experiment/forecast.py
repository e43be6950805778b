"""How long the rest of a run will take, from what each (system, task) took so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_LEAST = 3  # examples that must have ended before a cell tells its speed,
_SHARE = 0.1  # and their share of the cell: the first batch ends long after its rows began


@dataclass
class _Cell:
    """What is known of one (system, task), of this session alone.

    Attributes:
        total: its examples.
        before: those that an earlier session finished.
        done: those that ended in this session.
        begun, last: when it began, and when the last example ended; seconds.
    """

    system: str
    task: str
    total: int
    before: int = 0
    done: int = 0
    begun: float = 0.0
    last: float = 0.0

    @property
    def left(self) -> int:
        """Examples that are not done."""
        return self.total - self.before - self.done

    @property
    def seconds(self) -> float | None:
        """The time of one example; None before enough have ended."""
        if self.done < max(_LEAST, _SHARE * (self.done + self.left)) and self.left:
            return None
        return (self.last - self.begun) / self.done if self.done else None


class Forecast:
    """The time that is left.

    A cell that was not measured takes as long as its system does on other tasks, scaled by how the
    tasks differ where another system was measured on both.

    Args:
        cells: (system, task, examples to be done) of each.
    """

    def __init__(self, cells: Sequence[tuple[str, str, int]]) -> None:
        self._cells = [_Cell(*cell) for cell in cells]

    def finished_before(self, index: int, examples: int) -> None:
        """Notes examples of a cell that an earlier session finished."""
        self._cells[index].before = examples

    def begin(self, index: int, now: float) -> None:
        """Notes that a cell begins."""
        cell = self._cells[index]
        cell.begun = cell.last = now

    def advance(self, index: int, now: float) -> None:
        """Notes that one more example of a cell has ended."""
        cell = self._cells[index]
        cell.done += 1
        cell.last = now

    @property
    def left(self) -> int:
        """Examples that are not done."""
        return sum(cell.left for cell in self._cells)

    def seconds(self) -> float | None:
        """The seconds that are left; None before anything was measured."""
        if all(cell.seconds is None for cell in self._cells if cell.done) and self.left:
            return None
        total = 0.0
        for cell in self._cells:
            if cell.left:
                each = self._estimate(cell)
                if each is None:
                    return None
                total += each * cell.left
        return total

    def _estimate(self, cell: _Cell) -> float | None:
        """The time of one example of a cell: measured, or by way of other cells."""
        if cell.seconds is not None:
            return cell.seconds
        known = {(each.system, each.task): s for each in self._cells if (s := each.seconds)}
        scaled = [
            own * theirs / known[other, task]
            for (system, task), own in known.items()
            for (other, same), theirs in known.items()
            if system == cell.system and same == cell.task and (other, task) in known
        ]
        alike = [s for (system, _), s in known.items() if system == cell.system]
        others = [s for (_, task), s in known.items() if task == cell.task]
        for found in (scaled, alike, others, list(known.values())):
            if found:
                return median(found)
        return None


def spoken(seconds: float) -> str:
    """A duration as people say it: "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
