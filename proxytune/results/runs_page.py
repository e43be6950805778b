"""One page over several runs: their settings, curves over a sweep, tables, changed completions.

Like the page of one run (report.py) it loads nothing from elsewhere, and holds its texts packed.
What runs share (base, expert and tuned of a sweep over alpha) is shown and stored once.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from proxytune.errors import UserError
from proxytune.files import check_plain_files, read_jsonl, replace_file
from proxytune.records import Completion, Example
from proxytune.results import stats
from proxytune.results.comparison import is_number
from proxytune.results.curves import axis_of, curves, distinct_cells, drawn
from proxytune.results.packed import pack, short
from proxytune.results.runs import (
    Group,
    Run,
    all_differing,
    as_text,
    groups,
    is_scored,
    points_of,
    read_run,
    tells_apart,
    value_in,
)
from proxytune.results.tables import DASH, cell_texts, count_text, p_text
from proxytune.results.templates import asset, render
from proxytune.roles import SYSTEMS

NAME = "runs.html"
_SHARED = "all runs"
_SHOWN = 80  # characters of a setting's value in a table


def write_sweep(sweep: Path) -> Path:
    """Writes <sweep>/runs.html from the points of a sweep, and from a run in the folder itself.

    Raises:
        UserError: fewer than two of them have been scored; else as `write_runs`.
    """
    check_plain_files(sweep)
    found = [*([sweep] if is_scored(sweep) else []), *sorted(points_of(sweep), key=_natural)]
    return write_runs(found, sweep / NAME)


def write_runs(folders: Sequence[Path], path: Path) -> Path:
    """Writes one page over several runs.

    Args:
        folders: their results folders.
        path: the page.

    Raises:
        UserError: there are fewer than two; one of them has not been scored, or has a damaged
            file or a symbolic link.
    """
    if len(folders) < 2:
        raise UserError(f"a page over runs needs two of them that were scored, not {len(folders)}")
    names = _names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    replace_file(path, _page(runs, path).encode(errors="replace"))
    return path


def _natural(folder: Path) -> list[tuple[float, str]]:
    """A key that puts alpha=2 before alpha=10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", folder.name)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last part, or its way from the folder that all are in.

    What all names of a sweep's points have in common (",task=[gsm8k]") is left out.
    """
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        again = next(folder for folder in whole if whole.count(folder) > 1)
        raise UserError(f"{again} is given twice; give each run once")
    names = [folder.name for folder in whole]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath(whole))
        names = [str(folder.relative_to(common)) for folder in whole]
        names = [common.name if name == "." else name for name in names]
    settings = [re.split(r",(?=[^,=]+=)", name) for name in names]
    first = _common(settings)
    last = _common([each[:first:-1] for each in settings])
    cut = [",".join(each[first : len(each) - last]) for each in settings]
    return cut if all(cut) and len(set(cut)) == len(cut) else names


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many elements all lists have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*lists, strict=False)))


def _page(runs: list[Run], path: Path) -> Markup:
    tasks = list(dict.fromkeys(task for run in runs for task in run.rows))
    settings = all_differing(runs, tasks)
    of_task = {task: groups(runs, task) for task in tasks}
    data = _Texts(of_task)
    return render(
        "runs.html",
        title=f"{len(runs)} runs in {path.absolute().parent.name}",
        css=asset("page.css") + asset("runs.css"),
        js=asset("page.js") + asset("runs.js"),
        caveat=runs[0].caveat if _share_caveat(runs) else "",
        flags=_flags(of_task),
        settings=settings,
        runs=[
            _run_row(run, tasks, settings, path, "" if _share_caveat(runs) else run.caveat)
            for run in runs
        ],
        sections=[
            _section(group, number, len(each), tells_apart(each))
            for each in of_task.values()
            for number, group in enumerate(each, start=1)
        ],
        tasks=data.packed(),
        blocks=data.blocks,
    )


# -- what stands above the numbers --------------------


def _flags(of_task: dict[str, list[Group]]) -> list[str]:
    """A sentence for each thing that runs were asked differently on a task."""
    found = []
    for task, (most, *others) in of_task.items():
        for name in tells_apart([most, *others]):
            values = [f"{_asked(group, name)} in {_listed(group.runs)}" for group in others]
            found.append(f"{task}, {name}: {'; '.join(values)}; {_asked(most, name)} in the others")
    return found


def _asked(group: Group, name: str) -> str:
    value = group.asked.get(name)
    return DASH if value is None else short(as_text(value), _SHOWN)


def _listed(runs: Sequence[Run], most: int = 4) -> str:
    names = [run.name for run in runs]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _share_caveat(runs: Sequence[Run]) -> bool:
    """Whether all runs have the same caveat, which then stands above all of them."""
    return len({run.caveat for run in runs}) == 1


def _run_row(
    run: Run, tasks: Iterable[str], settings: Iterable[str], page: Path, caveat: str
) -> dict[str, Any]:
    whole = [value_in(run, tasks, name) for name in settings]
    return {
        "name": run.name,
        "link": _link(run.folder, page),
        "values": [short(value, _SHOWN) for value in whole],
        "caveat": caveat,
    }


def _link(folder: Path, page: Path) -> str | None:
    """The way from the page to a run's own page, if it lies in the same folder or below it."""
    target, start = folder.resolve() / "report.html", page.absolute().parent.resolve()
    if not target.is_file() or not target.is_relative_to(start):
        return None
    return f"./{quote(str(target.relative_to(start)))}"


# -- a task --------------------


def _section(group: Group, number: int, of: int, apart: Sequence[str]) -> dict[str, Any]:
    """A task's curves and tables, of runs that were asked the same."""
    head = group.runs[0].rows[group.task][0]
    axis = axis_of(group)
    lines = curves(group, axis) if axis else []
    figure = None
    if axis and drawn(lines):
        from proxytune.results import figures

        unit = str(head["label"]) + (", %" if head["percent"] else "")
        figure = Markup(figures.svg(figures.setting_curves(lines, axis, unit)))
    metrics = dict.fromkeys(str(row["metric"]) for r in group.runs for row in r.rows[group.task])
    tables = [table for name in metrics if (table := _table(group, name))]
    return {
        "title": f"{group.task}, part {number} of {of}" if of > 1 else group.task,
        "asked": [f"{name}: {_asked(group, name)}" for name in apart],
        "axis": axis,
        "label": str(head["label"]),
        "figure": figure,
        "again": any(line.label.endswith("(2)") for line in lines),
        "table": tables[0],
        "others": tables[1:],
        "differences": _differences(group),
    }


def _table(group: Group, metric: str) -> dict[str, Any] | None:
    """A metric of every run; what all runs share stands in a row of its own."""
    lacking = {"task": group.task}  # another formula or edition of the task has other metrics
    rows = {
        run.name: next((r for r in run.rows[group.task] if r["metric"] == metric), lacking)
        for run in group.runs
    }
    some = next((row for row in rows.values() if row is not lacking), None)
    if some is None:
        return None
    systems = [s for s in SYSTEMS if any(is_number(row.get(s)) for row in rows.values())]
    same = {s: distinct_cells(group, s) for s in systems}
    shared = [s for s in systems if len(same[s]) == 1 and len(same[s][0]) == len(group.runs) > 1]
    columns = [*systems, *(["gap_closed"] if _any(rows.values(), "gap_closed") else [])]
    body = []
    if shared:
        first = rows[same[shared[0]][0][0].name]
        cells = [_texts(first, c) if c in shared else None for c in columns]
        body.append({"name": _SHARED, "cells": cells, "count": ""})
    for run in group.runs:
        cells = [None if c in shared else _cell(rows, same, c, run) for c in columns]
        body.append({"name": run.name, "cells": cells, "count": count_text(rows[run.name])})
    return {
        "label": str(some["label"]) + ("" if some["higher_is_better"] else " ↓"),
        "head": ["run", *(c if c != "gap_closed" else "gap closed, %" for c in columns), "n"],
        "rows": body,
    }


def _any(rows: Iterable[dict[str, Any]], column: str) -> bool:
    return any(is_number(row.get(column)) for row in rows)


def _cell(rows: dict[str, Any], same: dict[str, list[list[Run]]], column: str, run: Run) -> Any:
    """A cell's texts; of what an earlier run of the table has, too, that run's name."""
    alike = next((each for each in same.get(column, []) if run in each), [run])
    if alike[0] is not run:
        return {"same": alike[0].name, "value": "", "between": ""}
    return _texts(rows[run.name], column)


def _texts(row: Mapping[str, Any], column: str) -> dict[str, str]:
    texts = cell_texts(row, column)
    return {"same": "", "value": texts.value, "between": texts.between}


def _differences(group: Group) -> list[list[str]]:
    """Paired differences of the headline from the first run, for systems that differ."""
    found = []
    head = group.runs[0].rows[group.task][0]
    scale = 100 if head["percent"] else 1
    for system in SYSTEMS:
        distinct = [each[0] for each in distinct_cells(group, system)]
        for first, run in zip(distinct[:1] * len(distinct), distinct, strict=True):
            if run is first:
                continue
            pair = (run.scores(group.task, system), first.scores(group.task, system))
            difference = stats.paired_difference(*pair, str(head["metric"]))
            if difference is None:
                continue
            value, low, high = (stats.scaled(each, scale) for each in difference[:3])
            between = f"{low:+.1f} to {high:+.1f}" if is_number(low) else DASH
            p = p_text(difference.p_value)
            found.append([system, run.name, first.name, f"{value:+.1f}", between, p])
    return found


# -- completions --------------------


class _Texts:
    """The data of the browser of changed completions.

    Attributes:
        tasks: per task its examples, and which block each run and system has.
        blocks: packed lists of [example, text, value, answer, parsed]; one for cells that are the
            same.
    """

    def __init__(self, of_task: dict[str, list[Group]]) -> None:
        self.blocks: list[str] = []
        self.tasks = [each for task, found in of_task.items() if (each := self._task(task, found))]

    def packed(self) -> str:
        """All of the data except the blocks, packed."""
        return pack(self.tasks)

    def _task(self, task: str, found: list[Group]) -> dict[str, Any] | None:
        known: dict[tuple[str, str], int] = {}
        examples: list[dict[str, Any]] = []
        cells: list[dict[str, Any]] = []
        for part, group in enumerate(found):
            places = dict(_places(group.runs[0].examples(task), known, examples))
            for system in SYSTEMS:
                for alike in distinct_cells(group, system):
                    block = self._block(alike[0], task, system, places)
                    if block is not None:
                        cells += [_place(run, system, block, part) for run in alike]
        head = found[0].runs[0].rows[task][0]
        harmful = not head["higher_is_better"]
        if not cells:
            return None
        return {
            "name": task,
            "good": f"not {head['label']}" if harmful else "right",
            "bad": str(head["label"]) if harmful else "wrong",
            "harmful": harmful,
            "examples": examples,
            "cells": cells,
        }

    def _block(self, run: Run, task: str, system: str, places: dict[str, int]) -> int | None:
        metric = str(run.rows[task][0]["metric"])
        scores = {score.example_id: score for score in run.scores(task, system)}
        rows = []
        for completion in read_jsonl(run.folder / task / system / "completions.jsonl", Completion):
            place = places.get(completion.example_id)
            if place is None or completion.sample:
                continue  # the browser shows the first of several samples
            score = scores.get(completion.example_id)
            value = score.values.get(metric) if score else None
            answer = short(score.answer) if score and score.answer else ""
            rows.append([place, completion.text, value, answer, int(score is None or score.parsed)])
        if not rows:
            return None
        self.blocks.append(pack(rows))
        return len(self.blocks) - 1


def _place(run: Run, system: str, block: int, part: int) -> dict[str, Any]:
    return {"run": run.name, "system": system, "block": block, "part": part}


def _places(
    asked: Iterable[Example], known: dict[tuple[str, str], int], examples: list[dict[str, Any]]
) -> Iterator[tuple[str, int]]:
    """Example id -> its place among a task's examples; another prompt is another example."""
    for example in asked:
        key = (example.id, example.prompt.raw)
        if key not in known:
            known[key] = len(examples)
            target = "" if example.target is None else short(example.target)
            examples.append({"id": example.id, "prompt": example.prompt.raw, "target": target})
        yield example.id, known[key]
