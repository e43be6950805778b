"""The curves of a sweep: a metric over the numeric setting in which runs differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.results.comparison import is_number
from proxytune.results.runs import Group, Run, Settings, as_text, differing
from proxytune.roles import SYSTEMS


@dataclass
class Curve:
    """One line of a figure.

    Attributes:
        label: the system, and the settings besides the axis in which it differs from others.
        x: values of the setting; [] for a system that does not depend on it, which has one value.
        y: the metric, as the table shows it.
        low, high: its 95 % interval; not-a-number for none.
    """

    label: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def _has(self, x: float) -> bool:
        return x in self.x

    def _add(self, x: float | None, numbers: tuple[float, float, float]) -> None:
        if x is not None:
            self.x.append(x)
        for values, number in zip((self.y, self.low, self.high), numbers, strict=True):
            values.append(number)


def distinct_cells(group: Group, system: str) -> list[list[Run]]:
    """The runs of a group that have a system, those with the same completions and scores together.

    Two cells are the same where their settings and all their numbers are.
    """
    runs = [run for run in group.runs if run.has(group.task, system)]
    cells = [run.settings(group.task, system) for run in runs]
    names = differing(cells)
    found: dict[Any, list[Run]] = {}
    for run, cell in zip(runs, cells, strict=True):
        key = [(name, as_text(cell.get(name))) for name in names]
        numbers = [as_text(row.get(system)) for row in run.rows[group.task]]
        found.setdefault((*key, *numbers), []).append(run)
    return list(found.values())


def axis_of(group: Group) -> str | None:
    """The numeric setting in which the runs of a group differ most; None if there is none.

    Of several, the one with the most values; then alpha; a seed comes last.
    """
    values: dict[str, set[float]] = {}
    for system in SYSTEMS:
        cells = [
            run.settings(group.task, system) for run in group.runs if run.has(group.task, system)
        ]
        for name in differing(cells):
            found = [cell[name] for cell in cells if name in cell]
            if all(is_number(each) and not isinstance(each, bool) for each in found):
                values.setdefault(name, set()).update(found)
    known = [name for name, found in values.items() if len(found) > 1]
    rank = {"alpha": 0, "decoding.seed": 2}
    return min(known, key=lambda n: (-len(values[n]), rank.get(n, 1), n), default=None)


def curves(group: Group, axis: str) -> list[Curve]:
    """The lines of a group's headline metric over a setting.

    Runs that differ in another setting, too, have a line for each of its values. A second run with
    the same settings and another number is never averaged: it begins a line of its own.
    """
    found: list[Curve] = []
    for system in SYSTEMS:
        found += _of_system(group, system, axis)
    return found


def _of_system(group: Group, system: str, axis: str) -> Iterator[Curve]:
    runs = [same[0] for same in distinct_cells(group, system)]
    cells = [run.settings(group.task, system) for run in runs]
    others = [name for name in differing(cells) if name != axis]
    lines: dict[str, list[Curve]] = {}
    for run, cell in sorted(zip(runs, cells, strict=True), key=lambda pair: _x(pair[1], axis) or 0):
        label = ", ".join([system, *(f"{n}={_value(cell, n)}" for n in others)])
        x = _x(cell, axis)
        alike = lines.setdefault(label, [])
        line = next((c for c in alike if c.x and x is not None and not c._has(x)), None)
        if line is None:
            line = Curve(label if not alike else f"{label} ({len(alike) + 1})")
            alike.append(line)
        line._add(x, _numbers(run, group.task, system))
    for alike in lines.values():
        yield from alike


def _x(cell: Settings, axis: str) -> float | None:
    value = cell.get(axis)
    return float(value) if is_number(value) and not isinstance(value, bool) else None


def _value(cell: Settings, name: str) -> str:
    text = as_text(cell.get(name))
    return text if len(text) <= 24 else text[:23] + "…"


def _numbers(run: Run, task: str, system: str) -> tuple[float, float, float]:
    row = run.rows[task][0]
    found = [row.get(column) for column in (system, f"{system}_low", f"{system}_high")]
    value, low, high = (float(each) if is_number(each) else float("nan") for each in found)
    return value, low, high


def drawn(lines: Sequence[Curve]) -> bool:
    """Whether there is a curve at all: a line of two points."""
    return any(len(line.x) > 1 for line in lines)
