"""Turns metrics into a comparison: a DataFrame with a row per metric and a column per number.

Values have the unit in which `tables` shows them, mostly percent.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import pandas as pd

from proxytune.records import Metric, Score
from proxytune.results import paper, stats
from proxytune.roles import SYSTEMS

AVERAGE = "average"
OTHER_DATASET = "† not the paper's dataset, not comparable with its numbers"

Scores = Mapping[tuple[str, str], Sequence[Score]]


def comparison(
    metrics: Sequence[Metric],
    infos: Mapping[str, Mapping[str, Any]],
    scores: Scores | None = None,
    paper_table: tuple[str, str] | None = None,
) -> pd.DataFrame:
    """One row per (task, metric), then the average gap closed over the tasks' headlines.

    Columns: task, metric, label, headline, higher_is_better, percent, n, n_examples; per system s:
    s, s_low, s_high, s_n, s_unparsed, paper_s; gap_closed, gap_closed_low, gap_closed_high; for
    proxy against base, expert and tuned: vs_*, vs_*_low, vs_*_high, vs_*_p; paper_table,
    paper_size, paper_gap_closed; hide_zeros, where a metric has it. Values and differences are in
    percent where `percent` is true; gaps closed always are. A missing cell is not-a-number.

    Args:
        metrics: rows of `stats.metrics`, of any number of tasks and systems.
        infos: task -> metric -> how it is shown (`records.MetricInfo`); the first metric of a
            task is its headline. A metric without an entry is shown under its own name.
        scores: (task, system) -> scores. The intervals of differences are computed from them;
            without scores, gaps closed have no interval and there are no differences.
        paper_table: table and size of the printed numbers that stand beside ours, as in
            ("2", "13B") for the paper's; see `paper.cell`.
    """
    found = {(m.task, m.metric, m.system): m for m in metrics}
    systems = [s for s in SYSTEMS if any(m.system == s for m in metrics)]
    rows: list[dict[str, Any]] = []
    headline_gaps: list[stats.GapClosed | None] = []
    for task in dict.fromkeys(m.task for m in metrics):
        names = list(infos.get(task, {}))
        names += dict.fromkeys(
            m.metric for m in metrics if m.task == task and m.metric not in names
        )
        present = [n for n in names if any((task, n, s) in found for s in systems)]
        for name in present:
            info = infos.get(task, {}).get(name)
            cells = {s: found[task, name, s] for s in systems if (task, name, s) in found}
            row = _row(task, name, info, cells, headline=name == names[0])
            gap = _add_comparisons(row, cells, scores or {})
            if row["headline"]:
                headline_gaps.append(gap)
            _add_paper(row, systems, paper_table)
            rows.append(row)
    if sum(gap is not None for gap in headline_gaps) > 1:
        rows.append(_average_row(headline_gaps, rows, paper_table))
    return pd.DataFrame(rows)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a cell has a number; neither not-a-number nor infinity is one."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _row(
    task: str, metric: str, info: Any, cells: Mapping[str, Metric], *, headline: bool
) -> dict[str, Any]:
    percent = info.percent if info else all(0 <= m.value <= 1 for m in cells.values())
    scale = 100 if percent else 1
    row: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "label": info.label if info else metric,
        "headline": headline,
        "higher_is_better": info.higher_is_better if info else True,
        "percent": percent,
        "n": max(m.n for m in cells.values()),
        "n_examples": max(m.n_examples for m in cells.values()),
    }
    for system, cell in cells.items():
        row[system] = stats.scaled(cell.value, scale)
        row[f"{system}_low"] = math.nan if cell.ci_low is None else stats.scaled(cell.ci_low, scale)
        row[f"{system}_high"] = (
            math.nan if cell.ci_high is None else stats.scaled(cell.ci_high, scale)
        )
        row[f"{system}_n"] = cell.n
        row[f"{system}_unparsed"] = cell.unparsed
    if info and info.hide_zeros:
        row["hide_zeros"] = True
    return row


def _add_comparisons(
    row: dict[str, Any], cells: Mapping[str, Metric], scores: Scores
) -> stats.GapClosed | None:
    """Adds the paired differences and the gap closed to a row.

    Returns:
        The gap for the average; None where there is none, or tuned may not differ from base: what
        is divided by almost nothing would decide the average.
    """
    task, metric, scale = row["task"], row["metric"], 100 if row["percent"] else 1
    stored = {s: scores[task, s] for s in cells if scores.get((task, s))}
    for other in ("base", "expert", "tuned"):
        if "proxy" in stored and other in stored:
            found = stats.paired_difference(stored["proxy"], stored[other], metric)
            if found is None:
                continue
            row[f"vs_{other}"] = stats.scaled(found.value, scale)
            row[f"vs_{other}_low"] = stats.scaled(found.low, scale)
            row[f"vs_{other}_high"] = stats.scaled(found.high, scale)
            row[f"vs_{other}_p"] = found.p_value
    if not {"base", "proxy", "tuned"} <= cells.keys():
        return None
    if {"base", "proxy", "tuned"} <= stored.keys():
        gap = stats.gap_closed_interval(stored["base"], stored["proxy"], stored["tuned"], metric)
        counted = None if gap is not None and gap.low is None else gap
    else:
        value = stats.gap_closed(cells["base"].value, cells["proxy"].value, cells["tuned"].value)
        gap = None if value is None else stats.GapClosed(value, None, None, stats.no_draws())
        counted = gap
    _set_gap(row, gap)
    return counted


def _add_paper(
    row: dict[str, Any], systems: Sequence[str], paper_table: tuple[str, str] | None
) -> None:
    if paper_table is None:
        return
    row["paper_table"], row["paper_size"] = paper_table
    key = paper.key_of(row["task"], row["metric"])
    for system in systems:
        value = paper.cell(*paper_table, system, key)
        row[f"paper_{system}"] = math.nan if value is None else value
    cells = (row.get(f"paper_{s}") for s in ("base", "proxy", "tuned"))
    values = [float(cell) for cell in cells if is_number(cell)]
    if len(values) == 3:
        gap = stats.gap_closed(*values)
        row["paper_gap_closed"] = math.nan if gap is None else 100 * gap


def _average_row(
    gaps: Sequence[stats.GapClosed | None],
    rows: Sequence[Mapping[str, Any]],
    paper_table: tuple[str, str] | None,
) -> dict[str, Any]:
    known = [gap for gap in gaps if gap is not None]
    row: dict[str, Any] = {
        "task": AVERAGE,
        "metric": "gap_closed",
        "label": f"of {len(known)} tasks",
        "headline": True,
        "higher_is_better": True,
        "percent": True,
        "n": len(known),
        "n_examples": len(known),
    }
    _set_gap(row, stats.average_gap_closed(known))
    cells = (r.get("paper_gap_closed") for r in rows if r["headline"])
    paper_gaps = [float(cell) for cell in cells if is_number(cell)]
    if paper_table is not None:
        row["paper_table"], row["paper_size"] = paper_table
        if len(known) == len(gaps) == len(paper_gaps):
            row["paper_gap_closed"] = sum(paper_gaps) / len(paper_gaps)
    return row


def _set_gap(row: dict[str, Any], gap: stats.GapClosed | None) -> None:
    """Fills the gap's three cells, in percent."""
    row["gap_closed"] = math.nan if gap is None else stats.scaled(gap.value, 100)
    row["gap_closed_low"] = row["gap_closed_high"] = math.nan
    if gap is not None and gap.low is not None and gap.high is not None:
        row["gap_closed_low"], row["gap_closed_high"] = (
            stats.scaled(gap.low, 100),
            stats.scaled(gap.high, 100),
        )


def caveat(table: pd.DataFrame) -> str:
    """The warning above a table that is not comparable; "" for a full run on the paper's data."""
    return "; ".join(part for part in (_smoke(table), _lacking(table), _others(table)) if part)


def _others(table: pd.DataFrame) -> str:
    tasks = _by_task(table, "other_dataset")
    return f"{OTHER_DATASET} ({tasks})" if tasks else ""


def _lacking(table: pd.DataFrame) -> str:
    tasks = _by_task(table, "unfinished")
    return f"unfinished, not comparable ({tasks})" if tasks else ""


def _by_task(table: pd.DataFrame, column: str) -> str:
    """What a column of words says of each task: "gsm8k: ...; triviaqa: ..."; "" for nothing."""
    rows = [row for row in headlines(table) if row["task"] != AVERAGE and _words(row, column)]
    return "; ".join(f"{row['task']}: {_words(row, column)}" for row in rows)


def other_dataset_text(row: Mapping[str, Any]) -> str:
    """How the dataset of a row's task differs from the paper's; "" where it does not."""
    return _words(row, "other_dataset")


def unfinished_text(row: Mapping[str, Any]) -> str:
    """Which systems of a row's task lack completions; "" where none does."""
    return _words(row, "unfinished")


def _words(row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    return text if isinstance(text, str) else ""  # pandas reads an empty cell as not-a-number


def _smoke(table: pd.DataFrame) -> str:
    rows = records(table)
    smoke = {str(r["task"]): int(r["limit"]) for r in rows if is_number(r.get("limit"))}
    if not smoke:
        return ""
    text = f"limit={next(iter(smoke.values()))}: smoke run, not comparable"
    if len(smoke) == len({r["task"] for r in rows}):
        return text
    return f"{text} ({', '.join(name for name in smoke if name != AVERAGE)})"


def systems_of(table: pd.DataFrame) -> list[str]:
    """The systems that a table compares, in the order of its columns."""
    return [s for s in SYSTEMS if s in table]


def headlines(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of each task's first metric, and the average."""
    return [row for row in records(table) if row["headline"]]


def has_gap(table: pd.DataFrame) -> bool:
    """Whether any row has a gap closed."""
    return "gap_closed" in table and any(map(is_number, table["gap_closed"].tolist()))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that people see.

    The parts of a metric ("toxicity/women") stay in the CSV, and so do zeros of `hide_zeros`.
    """
    kept: Any = table[[not ("/" in row["metric"] or _hidden(row)) for row in records(table)]]
    return kept


def hides_zeros(row: Mapping[str, Any]) -> bool:
    """Whether a row's metric asks for no row of zeros; most tables have no such column."""
    return row.get("hide_zeros") in (True,)  # and not not-a-number, which is an empty cell


def _hidden(row: Mapping[str, Any]) -> bool:
    """Whether a metric asks for no row of zeros, and this is one."""
    values = (row.get(system) for system in SYSTEMS)
    return hides_zeros(row) and not any(is_number(v) and v for v in values)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dictionaries; a missing cell is not-a-number."""
    rows: Any = table.to_dict("records")
    return rows
