"""Builds the comparison of a results folder from its runs' files; writes table.csv and table.md."""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.errors import UserError
from proxytune.files import check_name, read_jsonl, replace_file, set_aside
from proxytune.records import Metric, MetricInfo, Score, is_plain
from proxytune.results import tables
from proxytune.results.comparison import (
    AVERAGE,
    comparison,
    hides_zeros,
    is_number,
    other_dataset_text,
    records,
    unfinished_text,
)
from proxytune.roles import SYSTEMS

log = logging.getLogger(__name__)

_NAMES = ("task", "metric", "label")
_TRUTHS = ("headline", "higher_is_better", "percent")
_COLUMNS = (*_NAMES, *_TRUTHS, "n_examples")
# pandas would read a metric named "true" as a truth value, and Table "2" as a number
_TEXTS = (*_NAMES, "paper_table", "paper_size", "unfinished", "other_dataset")
_NUMBER = re.compile(
    rf"((paper_|vs_)?({'|'.join(SYSTEMS)})|(paper_)?gap_closed)(_low|_high|_n|_unparsed|_p)?"
    "|n|n_examples"
)


def read_scores(folder: Path, metrics: Sequence[Metric]) -> dict[tuple[str, str], list[Score]]:
    """The scores from which a results folder's metrics were computed, by (task, system).

    A damaged file counts as none: what is computed from pairs of scores is then left out.
    """
    found: dict[tuple[str, str], list[Score]] = {}
    for task, system in dict.fromkeys((m.task, m.system) for m in metrics):
        path = folder / task / system / "scores.jsonl"
        try:
            found[task, system] = list(read_jsonl(path, Score))
        except UserError as error:
            log.warning("%s; no comparison uses it", error)
            found[task, system] = []
    return found


def build_table(
    folder: Path,
    metrics: Sequence[Metric],
    infos: Mapping[str, Mapping[str, Any]],
    paper_table: tuple[str, str] | None = None,
    limit: int | None = None,
    unfinished: Mapping[str, str] | None = None,
    other_datasets: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """The comparison of a results folder, written to its table.csv and table.md.

    The results of earlier runs in the folder stay in the table: their tasks, and on this run's
    tasks those of their systems that answered as many examples.

    Args:
        folder: the results folder. metrics.jsonl and table.csv hold the results of earlier runs;
            the paired intervals are computed from the scores.jsonl files.
        metrics: the run's metrics.
        infos: task -> metric -> how it is shown.
        paper_table: see `comparison`.
        limit: how many examples per task a smoke run has; the table's header names it.
        unfinished: task -> which of its systems lack completions; the header names them, too.
        other_datasets: task -> how its dataset differs from the paper's; the header says so.
    """
    earlier = _earlier(folder, metrics)
    order = list(dict.fromkeys([*earlier.infos, *(m.task for m in metrics)]))
    everything = sorted([*metrics, *earlier.metrics], key=lambda m: order.index(m.task))
    scores = read_scores(folder, everything)
    table = comparison(everything, {**earlier.infos, **infos}, scores, paper_table)
    limits = earlier.limits | dict.fromkeys(infos, limit)
    lacking = earlier.unfinished | dict.fromkeys(infos, "") | dict(unfinished or {})
    table["limit"] = pd.array(_of_rows(table, limits, None), dtype="Int64")
    table["unfinished"] = _of_rows(table, lacking, "")
    others = earlier.other_datasets | dict.fromkeys(infos, "") | dict(other_datasets or {})
    if any(others.values()):
        table["other_dataset"] = _of_rows(table, others, "")
    to_csv(table, folder / "table.csv")
    replace_file(folder / "table.md", f"{tables.to_markdown(table)}\n".encode())
    return table


def _of_rows(table: pd.DataFrame, of_task: Mapping[str, Any], nothing: Any) -> list[Any]:
    """The value of each row's task; the average takes the first one that is not `nothing`."""
    found = [of_task.get(task, nothing) for task in table["task"]]
    if table["task"].iloc[-1] == AVERAGE:
        found[-1] = next((each for each in found if each != nothing), nothing)
    return found


@dataclass(frozen=True)
class _Earlier:
    """The results of earlier runs in a folder, by task."""

    metrics: list[Metric]
    infos: dict[str, dict[str, MetricInfo]]
    limits: dict[str, int | None]
    unfinished: dict[str, str]
    other_datasets: dict[str, str]


def _earlier(folder: Path, metrics: Sequence[Metric]) -> _Earlier:
    """Reads the results of earlier runs, except those that this run's metrics replace."""
    found = _Earlier([], {}, {}, {}, {})
    path = folder / "table.csv"
    if path.is_file():
        for row in _rows_or_none(path):
            task = str(row["task"])
            if task != AVERAGE:
                shown = MetricInfo(
                    row["label"], row["higher_is_better"], row["percent"], hides_zeros(row)
                )
                found.infos.setdefault(task, {})[str(row["metric"])] = shown
                limit = row.get("limit")
                found.limits[task] = int(limit) if is_number(limit) else None
                found.unfinished[task] = unfinished_text(row)
                found.other_datasets[task] = other_dataset_text(row)
    ours = {(m.task, m.system) for m in metrics}
    examples = {m.task: m.n_examples for m in metrics}
    for metric in read_jsonl(folder / "metrics.jsonl", Metric):
        task = metric.task
        if (task, metric.system) in ours:
            continue
        if examples[task] == metric.n_examples if task in examples else task in found.infos:
            found.metrics.append(metric)
    return found


def _rows_or_none(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier table; none, and the file set aside, if it is damaged."""
    try:
        return records(read_csv(path))
    except UserError as error:
        set_aside(path, error)
        return []


def to_csv(table: pd.DataFrame, path: Path) -> None:
    """Writes every column; `read_csv` gives the same table back."""
    replace_file(path, table.to_csv(index=False, float_format="%.10g").encode())


def read_csv(path: Path) -> pd.DataFrame:
    """Reads what `to_csv` wrote.

    Raises:
        UserError: the file is damaged.
    """
    kinds: Any = dict.fromkeys(_TEXTS, str) | {"limit": "Int64"}
    try:
        # a task may be called "null"; a missing cell is an empty one
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=[""])
    except (ValueError, TypeError, OverflowError) as error:  # pandas' own are ValueErrors, too
        why = str(error).partition("\n")[0]
        raise UserError(f"{path} is no table of ours ({why}); score the run again") from error
    if missing := [name for name in _COLUMNS if name not in table]:
        raise UserError(f"{path} has no column {missing[0]!r}; score the run again (stage=score)")
    if wrong := next((name for name in table if not _is_right(table, str(name))), None):
        raise UserError(f"{path}: the column {wrong} is damaged; score the run again (stage=score)")
    for task in set(table["task"]):
        check_name(f"a task of {path}", task)
    return table


def _is_right(table: pd.DataFrame, name: str) -> bool:
    """Whether a column holds what its name says."""
    column: Any = table[name]
    cells = column.dropna()
    if len(cells) < max(1, len(column)) and name in _COLUMNS:
        return False
    if name in _TEXTS:
        return all(map(is_plain, cells))
    if name in _TRUTHS:
        return column.dtype == bool
    if name == "hide_zeros":  # true, or empty
        return all(each is True for each in cells.tolist())
    if _NUMBER.fullmatch(name):  # a column without a cell is one of numbers
        return bool(column.dtype.kind in "iuf" and (cells.abs() <= sys.float_info.max).all())
    return True
