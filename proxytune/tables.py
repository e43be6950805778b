"""A comparison (`proxytune.comparison`) as Markdown, CSV, HTML, or in the terminal.

What is shown is a choice of its columns.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from proxytune.comparison import AVERAGE, SYSTEMS, comparison, is_number
from proxytune.records import Metric, Score, read_jsonl, replace_file

_DASH = "–"


def read_scores(folder: Path, metrics: Sequence[Metric]) -> dict[tuple[str, str], list[Score]]:
    """The scores behind the metrics of a results folder, by (task, system)."""
    cells = dict.fromkeys((m.task, m.system) for m in metrics)
    paths = {cell: folder / cell[0] / cell[1] / "scores.jsonl" for cell in cells}
    return {cell: list(read_jsonl(path, Score)) for cell, path in paths.items()}


def build(
    folder: Path,
    metrics: Sequence[Metric],
    infos: Mapping[str, Mapping[str, Any]],
    paper_table: tuple[str, str] | None = None,
    limit: int | None = None,
    unfinished: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """The comparison of a results folder, written to its table.csv and table.md.

    What earlier runs left in the folder stays in the table: their tasks, and their systems on
    this run's tasks where they answered as many examples.

    Args:
        folder: the results folder; metrics.jsonl and table.csv tell of earlier runs, the
            scores.jsonl files give the paired intervals.
        metrics: the run's metrics.
        infos: task -> metric -> how it is shown.
        paper_table: see `comparison`.
        limit: of a smoke run; it is said in the table's header.
        unfinished: task -> which of its systems lack completions, for the header, too.
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
    to_csv(table, folder / "table.csv")
    replace_file(folder / "table.md", f"{to_markdown(table)}\n".encode())
    return table


def _of_rows(table: pd.DataFrame, of_task: Mapping[str, Any], nothing: Any) -> list[Any]:
    """What is said of each row's task; the average has the first that is said of any."""
    found = [of_task.get(task, nothing) for task in table["task"]]
    if table["task"].iloc[-1] == AVERAGE:
        found[-1] = next((each for each in found if each != nothing), nothing)
    return found


@dataclass(frozen=True)
class _Shown:
    """How a metric of an earlier run is shown, read back from its table."""

    label: str
    higher_is_better: bool
    percent: bool


@dataclass(frozen=True)
class _Earlier:
    """What a results folder holds beside the current run, by task."""

    metrics: list[Metric]
    infos: dict[str, dict[str, _Shown]]
    limits: dict[str, int | None]
    unfinished: dict[str, str]


def _earlier(folder: Path, metrics: Sequence[Metric]) -> _Earlier:
    """Reads what earlier runs left in the folder."""
    found = _Earlier([], {}, {}, {})
    if (folder / "table.csv").is_file():
        for row in records(read_csv(folder / "table.csv")):
            task = str(row["task"])
            if task != AVERAGE:
                shown = _Shown(row["label"], row["higher_is_better"], row["percent"])
                found.infos.setdefault(task, {})[str(row["metric"])] = shown
                found.limits[task] = None if pd.isna(row["limit"]) else int(row["limit"])
                found.unfinished[task] = _unfinished(row)
    ours = {(m.task, m.system) for m in metrics}
    examples = {m.task: m.n_examples for m in metrics}
    for metric in read_jsonl(folder / "metrics.jsonl", Metric):
        task = metric.task
        if (task, metric.system) in ours:
            continue
        if examples[task] == metric.n_examples if task in examples else task in found.infos:
            found.metrics.append(metric)
    return found


def caveat(table: pd.DataFrame) -> str:
    """What a reader must know before comparing: a smoke or unfinished run; "" for a full one."""
    return "; ".join(part for part in (_smoke(table), _lacking(table)) if part)


def _lacking(table: pd.DataFrame) -> str:
    rows = [row for row in headlines(table) if _unfinished(row) and row["task"] != AVERAGE]
    tasks = "; ".join(f"{row['task']}: {_unfinished(row)}" for row in rows)
    return f"unfinished, not comparable ({tasks})" if tasks else ""


def _unfinished(row: Mapping[str, Any]) -> str:
    text = row.get("unfinished")
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


def _has_gap(table: pd.DataFrame) -> bool:
    return "gap_closed" in table and any(map(is_number, table["gap_closed"].tolist()))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The rows for people: a metric's parts ("toxicity/women") stay in the CSV."""
    kept: Any = table[~table["metric"].str.contains("/")]
    return kept


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dictionaries; a missing cell is not-a-number."""
    rows: Any = table.to_dict("records")
    return rows


# -- files --------------------


def to_csv(table: pd.DataFrame, path: Path) -> None:
    """Writes every column; `read_csv` gives the same table back."""
    replace_file(path, table.to_csv(index=False, float_format="%.10g").encode())


def read_csv(path: Path) -> pd.DataFrame:
    """Reads what `to_csv` wrote."""
    texts = ("task", "metric", "label", "paper_table", "paper_size")  # "true" is one, and "2"
    kinds: Any = dict.fromkeys(texts, str) | {"limit": "Int64"}
    return pd.read_csv(path, dtype=kinds)


def to_markdown(table: pd.DataFrame) -> str:
    """The table, its paired differences and its reading aid as Markdown."""
    systems = systems_of(table)
    has_gap = _has_gap(table)
    head = ["task", "metric", "n", *systems, *(["gap closed, %"] if has_gap else [])]
    body = []
    for row in records(shown(table)):
        cells = [value_text(row, s) + _bracketed(row, s) for s in systems]
        gap = [gap_text(row) + _bracketed(row, "gap_closed")] if has_gap else []
        name = f"**{row['label']}**" if row["headline"] else str(row["label"])
        body.append([_task(row), name, _count(row), *cells, *gap])
        paper_cells = [_number(row.get(f"paper_{s}")) for s in systems]
        if any(c != _DASH for c in paper_cells) or is_number(row.get("paper_gap_closed")):
            gap = [_number(row.get("paper_gap_closed"))] if has_gap else []
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
    if _has_gap(table):
        text += (
            " Gap closed: (proxy − base) / (tuned − base); no interval where tuned may not differ"
            " from base."
        )
    return text


# -- the terminal --------------------


def to_rich(table: pd.DataFrame, title: str = "") -> Table:
    """The table for a terminal of 80 to 100 columns: value, interval and the paper's below it."""
    systems = systems_of(table)
    has_gap = _has_gap(table)
    has_paper = any(is_number(r.get(f"paper_{s}")) for r in records(table) for s in systems)
    lines = ["grey: 95 % interval", *(["italic: the paper's"] if has_paper else [])]
    caption = "; ".join([*lines, *(["gap closed in %"] if has_gap else [])])
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
    if has_gap:
        shape.add_column("gap\nclosed", justify="right", no_wrap=True)
    shape.add_column("n", justify="right", no_wrap=True)
    for row in records(shown(table)):
        name = Text(_task(row) if row["headline"] else "", style="bold")
        name.append(("\n" if row["headline"] else "") + str(row["label"]), style="not bold")
        cells = [_terminal_cell(row, s, value_text(row, s)) for s in systems]
        gap = [_terminal_cell(row, "gap_closed", gap_text(row))] if has_gap else []
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
    has_gap = _has_gap(table)
    head = ["task", *systems, *(["gap closed, %"] if has_gap else []), "n"]
    parts = ["<table><thead><tr>"]
    parts += [f'<th scope="col"{_class(i)}>{html.escape(h)}</th>' for i, h in enumerate(head)]
    parts.append("</tr></thead><tbody>")
    for row in records(shown(table)):
        name = f'<span class="metric">{html.escape(str(row["label"]))}</span>'
        if row["headline"]:
            name = f"{html.escape(_task(row))} {name}"
        parts.append(f'<tr{_class(row["headline"], "headline")}><th scope="row">{name}</th>')
        parts += [_html_cell(row, s, value_text(row, s)) for s in systems]
        if has_gap:
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
