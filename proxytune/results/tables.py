"""A comparison (`proxytune.results.comparison`) as Markdown, as HTML, or in the terminal.

What is shown is a choice of its columns.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from proxytune.results.comparison import (
    AVERAGE,
    caveat,
    has_gap,
    headlines,
    is_number,
    records,
    shown,
    systems_of,
)
from proxytune.roles import SYSTEMS

_DASH = "–"


def to_markdown(table: pd.DataFrame) -> str:
    """The table, its paired differences and its reading aid as Markdown."""
    systems = systems_of(table)
    with_gap = has_gap(table)
    head = ["task", "metric", "n", *systems, *(["gap closed, %"] if with_gap else [])]
    body = []
    for row in records(shown(table)):
        cells = [value_text(row, s) + _bracketed(row, s) for s in systems]
        gap = [gap_text(row) + _bracketed(row, "gap_closed")] if with_gap else []
        name = f"**{row['label']}**" if row["headline"] else str(row["label"])
        body.append([_task(row), name, _count(row), *cells, *gap])
        paper_cells = [_number(row.get(f"paper_{s}")) for s in systems]
        if any(c != _DASH for c in paper_cells) or is_number(row.get("paper_gap_closed")):
            gap = [_number(row.get("paper_gap_closed"))] if with_gap else []
            body.append(["", "*the paper*", "", *paper_cells, *gap])
    parts = [f"**{caveat(table)}**"] if caveat(table) else []
    parts += [markdown_table(head, body, right_from=2), reading_aid(table)]
    differences = difference_rows(table)
    if differences:
        head = ["task", "metric", "proxy minus", "difference", "95 % interval", "p"]
        parts += ["Paired differences on the same examples:", markdown_table(head, differences, 3)]
    unparsed = unparsed_text(table)
    if unparsed:
        parts.append(unparsed)
    return "\n\n".join(parts)


def difference_rows(table: pd.DataFrame) -> list[list[str]]:
    """Headlines only: task, metric, the other system, difference, interval, p."""
    found = []
    for row in headlines(table):
        for other in ("base", "expert", "tuned"):
            value = row.get(f"vs_{other}")
            if is_number(value):
                low, high = row[f"vs_{other}_low"], row[f"vs_{other}_high"]
                between = f"{low:+.1f} to {high:+.1f}" if is_number(low) else _DASH
                p = p_text(row[f"vs_{other}_p"])
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
            " Gap closed: (proxy − base) / (tuned − base); no interval where tuned may not differ"
            " from base."
        )
    return text


# -- the terminal --------------------


def to_rich(table: pd.DataFrame, title: str = "") -> Table:
    """The table for a terminal of 80 to 100 columns: value, interval and the paper's below it."""
    systems = systems_of(table)
    with_gap = has_gap(table)
    has_paper = any(is_number(r.get(f"paper_{s}")) for r in records(table) for s in systems)
    lines = ["grey: 95 % interval", *(["italic: the paper's"] if has_paper else [])]
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
        cells = [_terminal_cell(row, s, value_text(row, s)) for s in systems]
        gap = [_terminal_cell(row, "gap_closed", gap_text(row))] if with_gap else []
        shape.add_row(name, *cells, *gap, _count(row))
    return shape


def _terminal_cell(row: Mapping[str, Any], column: str, value: str) -> Text:
    cell = Text("" if value == _DASH and row["task"] == AVERAGE else value)
    # whole percents: narrow columns leave room for the tasks' names
    between = _between(row, column, 0 if row["percent"] else 1)
    if between:
        cell.append(f"\n{between}", style="bright_black")
    if is_number(row.get(f"paper_{column}")):
        cell.append(f"\n{_number(row[f'paper_{column}'])}", style="italic")
    return cell


# -- HTML --------------------


def to_html(table: pd.DataFrame) -> str:
    """The table as an HTML `<table>`, without style; cells carry the classes num, ci and paper."""
    systems = systems_of(table)
    with_gap = has_gap(table)
    head = ["task", *systems, *(["gap closed, %"] if with_gap else []), "n"]
    parts = ["<table><thead><tr>"]
    parts += [f'<th scope="col"{_class(i)}>{html.escape(h)}</th>' for i, h in enumerate(head)]
    parts.append("</tr></thead><tbody>")
    for row in records(shown(table)):
        name = f'<span class="metric">{html.escape(str(row["label"]))}</span>'
        if row["headline"]:
            name = f"{html.escape(_task(row))} {name}"
        parts.append(f'<tr{_class(row["headline"], "headline")}><th scope="row">{name}</th>')
        parts += [_html_cell(row, s, value_text(row, s)) for s in systems]
        if with_gap:
            parts.append(_html_cell(row, "gap_closed", gap_text(row)))
        parts.append(f'<td class="num">{_count(row)}</td></tr>')
    parts.append("</tbody></table>")
    return "".join(parts)


def _html_cell(row: Mapping[str, Any], column: str, value: str) -> str:
    text = "" if value == _DASH and row["task"] == AVERAGE else value
    between = _between(row, column)
    if between:
        text += f'<span class="ci">{between}</span>'
    if is_number(row.get(f"paper_{column}")):
        text += f'<span class="paper">paper {_number(row[f"paper_{column}"])}</span>'
    return f'<td class="num">{text}</td>'


def _class(wanted: Any, name: str = "num") -> str:
    return f' class="{name}"' if wanted else ""


# -- words for cells --------------------


def value_text(row: Mapping[str, Any], system: str) -> str:
    """A system's value, one decimal."""
    return _number(row.get(system))


def gap_text(row: Mapping[str, Any]) -> str:
    """The gap closed, one decimal."""
    return _number(row.get("gap_closed"))


def p_text(p: float) -> str:
    """A p-value as people write it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _task(row: Mapping[str, Any]) -> str:
    return str(row["task"]) + ("" if row["higher_is_better"] else " ↓")


def _count(row: Mapping[str, Any]) -> str:
    if row["task"] == AVERAGE:
        return ""
    counts = [int(row[f"{s}_n"]) for s in SYSTEMS if is_number(row.get(f"{s}_n"))]
    low, high = min(counts), max(counts)
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def _number(value: Any) -> str:
    return f"{value:.1f}" if is_number(value) else _DASH


def _between(row: Mapping[str, Any], column: str, decimals: int = 1) -> str:
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    known = is_number(low) and is_number(high)
    return f"{low:.{decimals}f}–{high:.{decimals}f}" if known else ""


def _bracketed(row: Mapping[str, Any], column: str) -> str:
    between = _between(row, column)
    return f" ({between})" if between else ""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> str:
    """A Markdown table whose columns are right-aligned from one on."""
    rule = ["---" if i < right_from else "---:" for i in range(len(head))]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
