"""A comparison (`proxytune.results.comparison`) as Markdown, as HTML, or in the terminal.

Each form shows a choice of its columns.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from proxytune.results import paper, templates
from proxytune.results.comparison import (
    AVERAGE,
    caveat,
    has_gap,
    headlines,
    is_number,
    other_dataset_text,
    records,
    shown,
    systems_of,
)
from proxytune.roles import SYSTEMS

DASH = "–"  # a cell without a number
PRINTED = "Printed: measured elsewhere, with other prompts than ours"


def to_markdown(table: pd.DataFrame) -> str:
    """The table, its paired differences and its reading aid as Markdown."""
    systems = systems_of(table)
    with_gap = has_gap(table)
    head = ["task", "metric", "n", *systems, *(["gap closed, %"] if with_gap else [])]
    body = []
    for row in records(shown(table)):
        cells = [_with_interval(row, s) for s in systems]
        gap = [_with_interval(row, "gap_closed")] if with_gap else []
        label = _escaped(str(row["label"]))
        name = f"**{label}**" if row["headline"] else label
        body.append([_escaped(_task(row)), name, count_text(row), *cells, *gap])
        paper_cells = [number_text(row.get(f"paper_{s}")) for s in systems]
        if any(c != DASH for c in paper_cells) or is_number(row.get("paper_gap_closed")):
            gap = [number_text(row.get("paper_gap_closed"))] if with_gap else []
            body.append(["", f"*{_printer(table)}*", "", *paper_cells, *gap])
    parts = [f"**{_escaped(caveat(table))}**"] if caveat(table) else []
    parts += [markdown_table(head, body, right_from=2), reading_aid(table)]
    if found := printed_sources(table):
        parts.append("\n".join(f"- {_escaped(each)}" for each in found))
    differences = difference_rows(table)
    if differences:
        head = ["task", "metric", "proxy minus", "difference", "95 % interval", "p"]
        differences = [[_escaped(task), _escaped(name), *r] for task, name, *r in differences]
        parts += ["Paired differences on the same examples:", markdown_table(head, differences, 3)]
    unparsed = unparsed_text(table)
    if unparsed:
        parts.append(unparsed)
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """A name in Markdown, which lets HTML through."""
    return escape(text, quote=False)


def difference_rows(table: pd.DataFrame) -> list[list[str]]:
    """The paired differences of each task's first metric.

    Returns:
        Rows of task, metric, the system that is compared with the proxy, difference, interval, p.
    """
    found = []
    for row in headlines(table):
        for other in ("base", "expert", "tuned"):
            value = row.get(f"vs_{other}")
            if is_number(value):
                low, high, p = (row.get(f"vs_{other}_{each}") for each in ("low", "high", "p"))
                known = is_number(low) and is_number(high)
                between = f"{low:+.1f} to {high:+.1f}" if known else DASH
                p = p_text(p) if is_number(p) else DASH
                found.append([_task(row), row["label"], other, f"{value:+.1f}", between, p])
    return found


def unparsed_text(table: pd.DataFrame) -> str:
    """How many answers could not be extracted, per task and system; "" when all could."""
    parts = []
    for row in headlines(table):
        counts = {s: row.get(f"{s}_unparsed") for s in systems_of(table)}
        known = {s: int(c) for s, c in counts.items() if c is not None and is_number(c)}
        if any(known.values()):
            words = ", ".join(f"{s} {c}" for s, c in known.items())
            parts.append(f"{row['task']}: {words} of {int(row['n_examples'])}")
    return f"Unparsed answers: {'; '.join(parts)}." if parts else ""


def reading_aid(table: pd.DataFrame) -> str:
    """How to read the table, in one paragraph."""
    text = "Ranges: 95 % intervals."
    if not all(table["higher_is_better"].tolist()):
        text += " ↓: lower is better."
    if has_gap(table):
        text += (
            " Gap closed: (proxy − base) / (tuned − base); no interval, and no part in an average,"
            " where tuned may not differ from base."
        )
    return text + (f" {PRINTED}." if printed_sources(table) else "")


def printed_sources(table: pd.DataFrame) -> list[str]:
    """Where the printed numbers that are not the paper's come from."""
    shown = {
        (system, paper.key_of(str(row["task"]), str(row["metric"])))
        for row in records(table)
        for system in systems_of(table)
        if is_number(row.get(f"paper_{system}"))
    }
    return paper.sources(_place(table), shown) if _place(table) else []


def _place(table: pd.DataFrame) -> str:
    """The experiment whose numbers others have printed; "" where the paper has, or nobody."""
    places = {row.get("paper_table") for row in records(table)}
    return next((str(each) for each in places if paper.is_elsewhere(str(each))), "")


def _printer(table: pd.DataFrame) -> str:
    return "printed" if _place(table) else "the paper"


# -- the terminal --------------------


def to_rich(table: pd.DataFrame, title: str = "") -> Table:
    """The table for a terminal of 80 to 100 columns.

    A cell has three lines: the value, its interval, and the paper's value.
    """
    systems = systems_of(table)
    with_gap = has_gap(table)
    has_paper = any(is_number(r.get(f"paper_{s}")) for r in records(table) for s in systems)
    printed = "printed elsewhere (table.md says where)" if _place(table) else "the paper's"
    lines = ["grey: 95 % interval", *([f"italic: {printed}"] if has_paper else [])]
    caption = "; ".join([*lines, *(["gap closed in %"] if with_gap else [])])
    if unparsed_text(table):
        caption += "\n" + unparsed_text(table)
    heading = Text(title, style="bold")
    if caveat(table):
        heading.append(f"  {caveat(table)}" if title else caveat(table), style="bold red")
    shape = Table(
        title=heading,
        caption=caption,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
    shape.add_column("task", overflow="fold", min_width=16)
    for system in systems:
        shape.add_column(system, justify="right", no_wrap=True)
    if with_gap:
        shape.add_column("gap\nclosed", justify="right", no_wrap=True)
    shape.add_column("n", justify="right", no_wrap=True)
    for row in records(shown(table)):
        name = Text(_task(row) if row["headline"] else "", style="bold")
        name.append(("\n" if row["headline"] else "") + str(row["label"]), style="not bold")
        cells = [_terminal_cell(row, system) for system in systems]
        gap = [_terminal_cell(row, "gap_closed")] if with_gap else []
        shape.add_row(name, *cells, *gap, count_text(row))
    return shape


def _terminal_cell(row: Mapping[str, Any], column: str) -> Text:
    # whole percents: narrow columns leave room for the tasks' names
    value, between, theirs = cell_texts(row, column, decimals=0 if row["percent"] else 1)
    cell = Text(value)
    if between:
        cell.append(f"\n{between}", style="bright_black")
    if theirs:
        cell.append(f"\n{theirs}", style="italic")
    return cell


# -- HTML --------------------


def to_html(table: pd.DataFrame) -> Markup:
    """The table as an HTML `<table>`, without style; cells carry the classes num, ci and paper."""
    systems = systems_of(table)
    with_gap = has_gap(table)
    head = ["task", *systems, *(["gap closed, %"] if with_gap else []), "n"]
    columns = [*systems, *(["gap_closed"] if with_gap else [])]
    rows = [
        {
            "task": _task(row),
            "label": row["label"],
            "headline": row["headline"],
            "cells": [cell_texts(row, column) for column in columns],
            "count": count_text(row),
        }
        for row in records(shown(table))
    ]
    printer = _printer(table).removeprefix("the ")
    return templates.render("comparison.html", head=head, rows=rows, printer=printer)


# -- words for cells --------------------


class CellTexts(NamedTuple):
    """The three texts of a cell: our value, its interval, the paper's value; "" for none."""

    value: str
    between: str
    paper: str


def cell_texts(row: Mapping[str, Any], column: str, decimals: int = 1) -> CellTexts:
    """The texts of one cell; `column` is a system or "gap_closed", `decimals` the interval's."""
    value, printed = number_text(row.get(column)), row.get(f"paper_{column}")
    return CellTexts(
        "" if value == DASH and row["task"] == AVERAGE else value,
        _between(row, column, decimals),
        number_text(printed) if is_number(printed) else "",
    )


def number_text(value: Any) -> str:
    """A number with one decimal; a dash for a missing one."""
    return f"{value:.1f}" if is_number(value) else DASH


def p_text(p: float, equals: str = "") -> str:
    """A p-value with three decimals, or "< 0.001".

    Args:
        p: the p-value.
        equals: stands before the decimals, where the text needs a sign there ("p = 0.123").
    """
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def _task(row: Mapping[str, Any]) -> str:
    other = other_dataset_text(row) and row["task"] != AVERAGE
    return str(row["task"]) + ("" if row["higher_is_better"] else " ↓") + (" †" if other else "")


def count_text(row: Mapping[str, Any]) -> str:
    """How many examples a row's systems have in their denominators: "150", "148–150"."""
    if row["task"] == AVERAGE:
        return ""
    counts = [int(row[f"{s}_n"]) for s in SYSTEMS if is_number(row.get(f"{s}_n"))]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def _between(row: Mapping[str, Any], column: str, decimals: int = 1) -> str:
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    known = is_number(low) and is_number(high)
    return f"{low:.{decimals}f}–{high:.{decimals}f}" if known else ""


def _with_interval(row: Mapping[str, Any], column: str) -> str:
    """A value, and its interval in brackets where it has one."""
    between = _between(row, column)
    return number_text(row.get(column)) + (f" ({between})" if between else "")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> str:
    """A Markdown table whose columns are right-aligned from the column `right_from` on."""
    rule = ["---" if i < right_from else "---:" for i in range(len(head))]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
