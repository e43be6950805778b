"""The paper's tables with our numbers in them: ours, the paper's, the published runs', difference.

Our numbers come from comparison tables on disk (`folder.to_csv`), so making a table takes seconds
and no model. Everything is in percent. A table that compares systems needs an entry in
`paper.TABLES`; one of another kind needs a function in `paper_tables_other.MAKERS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.errors import UserError
from proxytune.results import paper, stats, tables
from proxytune.results.comparison import (
    AVERAGE,
    OTHER_DATASET,
    is_number,
    other_dataset_text,
    records,
    systems_of,
)
from proxytune.results.folder import read_csv, to_csv
from proxytune.results.paper_tables_other import MAKERS, Made
from proxytune.results.run_json import read_run_json
from proxytune.roles import SYSTEMS

GAP = "gap closed"
NUMBERS = tuple(sorted({*paper.TABLES, *MAKERS}, key=int))
# The tables that end in an average gap closed. Table 3 has none: its gaps lie between systems that
# are nearly equal.
_AVERAGED = ("2", "4", "5", "15")
_COLUMNS = (
    "table",
    "size",
    "metric",
    "system",
    "ours",
    "low",
    "high",
    "n",
    "paper",
    "published",
    "difference",
    "p",
    "other_dataset",
)
# columns of a comparison that rest on the tuned model
_OF_TUNED = ("tuned", "gap_closed", "vs_tuned")
# pairs of systems whose difference is tested on the same examples
_PAIRS = {f"proxy − {other}": other for other in ("expert", "tuned")}


@dataclass(frozen=True)
class Measured:
    """One of our numbers, in percent.

    Attributes:
        value: the number.
        low, high: its 95 % interval.
        n: how many examples it rests on.
        p: for a difference between two systems, the p-value of "no difference".
        other_dataset: how the dataset differs from the paper's; "" where it does not.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    p: float | None = None
    other_dataset: str = ""


# (table, size, the paper's metric, a system, a pair of systems or `GAP`) -> our number
Ours = dict[tuple[str, str, str, str], Measured]


def collect(runs: Path, metrics: Path) -> list[Path]:
    """Copies the comparison tables of finished runs to the folder that is committed.

    It leaves out tasks of smoke runs and unfinished tasks. It also leaves out variants of an
    experiment (another alpha, a traced run): their folder has another name than the experiment.

    Args:
        runs: the folder of results folders.
        metrics: the folder of committed tables.

    Returns:
        The files written.
    """
    written = []
    for path in sorted(runs.glob("*/table.csv")):
        run = path.with_name("run.json")
        name = read_run_json(run.parent).get("name") if run.is_file() else None
        table: Any = read_csv(path)
        table = table.reindex(columns=dict.fromkeys([*table, "unfinished"]))
        table = table[table["limit"].isna() & table["unfinished"].isna()]
        if name != path.parent.name or "paper_table" not in table or table.empty:
            continue
        metrics.mkdir(parents=True, exist_ok=True)
        to_csv(table.drop(columns=["limit", "unfinished"]), metrics / f"{name}.csv")
        written.append(metrics / f"{name}.csv")
    return written


def read_ours(metrics: Path) -> Ours:
    """Our numbers from the committed tables."""
    ours: Ours = {}
    for path in sorted(metrics.glob("*.csv")):
        ours |= from_comparison(read_csv(path))
    return ours


def from_comparison(table: pd.DataFrame) -> Ours:
    """Our numbers from one comparison whose paper_table and paper_size name its place."""
    ours: Ours = {}
    columns = {s: s for s in systems_of(table)} | {GAP: "gap_closed"}
    columns |= {pair: f"vs_{other}" for pair, other in _PAIRS.items()}
    for row in records(table):
        key = paper.key_of(str(row["task"]), str(row["metric"]))
        if key is None or not isinstance(row.get("paper_table"), str):
            continue
        number, size = row["paper_table"], str(row["paper_size"])
        for target in paper.tables_filled_by(number, size):
            for name, column in columns.items():
                if (number, target) == ("5", "15") and column in _OF_TUNED:
                    continue  # the tuned model of Table 15 is tuned with LoRA, in runs of its own
                if key in paper.TABLES.get(target, ()) and is_number(row.get(column)):
                    ours[target, size, key, name] = _measured(row, column)
    return ours


def _measured(row: Mapping[str, Any], column: str) -> Measured:
    """A number of a comparison with its interval, count and p-value, where it has them."""
    low, high, n, p = (row.get(f"{column}_{name}") for name in ("low", "high", "n", "p"))
    n = n if is_number(n) else row["n"]
    other = other_dataset_text(row)
    return Measured(row[column], _or_none(low), _or_none(high), int(n), _or_none(p), other)


def from_rescored(rows: Sequence[Mapping[str, Any]]) -> Ours:
    """The authors' runs, scored by us, in the place of our numbers.

    Args:
        rows: the output of `scripts/rescore.py --json`.
    """
    scored = {(f"{r['benchmark']}/{r['system']}", r["metric"]): r["ours"] for r in rows}
    ours: Ours = {}
    for row in records(paper.published()):
        value = scored.get((row["run"], row["run_metric"]))
        if value is None:
            continue
        scale = 1 if row["metric"] == "alpacafarm_win_rate" else 100
        system, sizes = row["system"], (row["size"],)
        if row["size"] == "7B":  # one small expert serves both sizes
            system, sizes = "expert", paper.SIZES
        if system == "lora":
            system = "tuned"
        for size in sizes:
            ours[row["table"], size, row["metric"], system] = Measured(stats.scaled(value, scale))
    return ours


def build(number: str, ours: Ours, *, pocket: bool = False) -> pd.DataFrame:
    """One of the paper's tables: a row per size, metric and system, then the gaps closed.

    Args:
        number: a key of `paper.TABLES`.
        ours: our numbers; may be empty.
        pocket: whether the rows are the pocket family's, not those of the paper's sizes.

    Returns:
        Columns table, size, metric, system, ours, low, high, n, paper, published, difference
        (ours - paper), p (of a pair of systems, tested on the same examples), other_dataset (how
        the dataset of "ours" differs from the paper's); a missing number is not-a-number.

    Raises:
        UserError: the paper has no such table of results.
    """
    if number not in paper.TABLES:
        raise UserError(f"no table {number} of results; there are {', '.join(paper.TABLES)}")
    sizes = (paper.POCKET_SIZE,) if pocket else ("-",) if number == "7" else paper.SIZES
    rows: list[dict[str, Any]] = []
    for size in sizes:
        gaps: list[dict[str, Any]] = []
        for key in paper.TABLES[number]:
            rows += _metric_rows(number, size, key, ours)
            gaps.append(_gap_row(number, size, key, rows, ours))
        gaps = [
            row for row in gaps if any(is_number(row[c]) for c in ("ours", "paper", "published"))
        ]
        rows += gaps
        if len(gaps) > 1 and number in _AVERAGED:
            rows.append(_average(number, size, gaps))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def to_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown; each size shows the columns in which it has a number."""
    number = str(table["table"].iloc[0])
    compared = any(is_number(row["difference"]) for row in records(table))
    parts = [
        f"# Table {number}",
        "Percent." + (" Difference: ours − the paper's." if compared else ""),
    ]
    for size, group in table.groupby("size", sort=False):
        rows = records(group)
        columns = {name: [show(row) for row in rows] for name, show in _SHOWN.items()}
        known = {name: cells for name, cells in columns.items() if set(cells) != {tables.DASH}}
        body = [list(cells) for cells in zip(*known.values(), strict=True)]
        heading = "" if size == "-" else f"## {size}"
        parts += [heading, tables.markdown_table(list(known), body, right_from=2)]
        others = {row["metric"]: row["other_dataset"] for row in rows if row["other_dataset"]}
        if others:
            told = "; ".join(f"{metric}: {other}" for metric, other in others.items())
            parts.append(f"{OTHER_DATASET} ({told})")
        stated = paper.AVERAGE_GAP_CLOSED.get((number, str(size)))
        if stated is not None:
            parts.append(f"The paper states an average gap closed of {stated} %.")
    return "\n\n".join(p for p in parts if p) + "\n"


def _metric_rows(number: str, size: str, key: str, ours: Ours) -> list[dict[str, Any]]:
    """The rows of one metric: each system's, then those of the pairs that were tested."""
    rows = []
    for system in SYSTEMS:
        mine = ours.get((number, size, key, system))
        theirs = paper.cell(number, size, system, key)
        published = paper.cell(number, size, system, key, "published")
        if mine or theirs is not None or published is not None:
            rows.append(_line(number, size, key, system, mine, theirs, published))
    for pair, other in _PAIRS.items():
        mine = ours.get((number, size, key, pair))
        if mine:
            proxy = (paper.cell(number, size, "proxy", key, s) for s in ("paper", "published"))
            theirs = (paper.cell(number, size, other, key, s) for s in ("paper", "published"))
            apart = [
                None if a is None or b is None else a - b
                for a, b in zip(proxy, theirs, strict=True)
            ]
            rows.append(_line(number, size, key, pair, mine, *apart))
    return rows


def _gap_row(
    number: str, size: str, key: str, rows: Sequence[Mapping[str, Any]], ours: Ours
) -> dict[str, Any]:
    """The gap closed of one metric, from our values, the paper's and the published runs'."""
    cells = {r["system"]: r for r in rows if (r["size"], r["metric"]) == (size, key)}

    def gap(column: str) -> float | None:
        found = (cells.get(s, {}).get(column) for s in ("base", "proxy", "tuned"))
        values = [float(value) for value in found if is_number(value)]
        share = stats.gap_closed(*values) if len(values) == 3 else None
        return None if share is None else 100 * share

    mine = ours.get((number, size, key, GAP))
    value = gap("ours")
    if mine is None and value is not None:
        other = next((c["other_dataset"] for c in cells.values() if c["other_dataset"]), "")
        mine = Measured(value, other_dataset=other)
    return _line(number, size, key, GAP, mine, gap("paper"), gap("published"))


def _average(number: str, size: str, gaps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The average gap closed of a size; each column's only where every metric has its gap.

    Where our gaps have intervals, ours leaves out one that has none: its tuned model may not differ
    from its base.
    """
    sure = gaps
    if any(is_number(row["low"]) for row in gaps):
        sure = [row for row in gaps if is_number(row["low"]) or not is_number(row["ours"])]
    means: dict[str, float | None] = {}
    for column, rows in {"ours": sure, "paper": gaps, "published": gaps}.items():
        values = [row[column] for row in rows]
        means[column] = sum(values) / len(values) if all(map(is_number, values)) else None
    others = "; ".join(dict.fromkeys(row["other_dataset"] for row in gaps if row["other_dataset"]))
    mine = None
    if means["ours"] is not None:
        mine = Measured(means["ours"], other_dataset=others)
    return _line(number, size, AVERAGE, GAP, mine, means["paper"], means["published"])


def _line(
    number: str,
    size: str,
    key: str,
    system: str,
    mine: Measured | None,
    theirs: float | None,
    published: float | None,
) -> dict[str, Any]:
    """A row of `build`."""
    values = [
        number,
        size,
        key,
        system,
        mine and mine.value,
        mine and mine.low,
        mine and mine.high,
        mine and mine.n,
        theirs,
        published,
        mine.value - theirs if mine and theirs is not None else None,
        mine and mine.p,
        mine.other_dataset if mine else "",
    ]
    return {c: math.nan if v is None else v for c, v in zip(_COLUMNS, values, strict=True)}


def _or_none(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _interval(row: Mapping[str, Any]) -> str:
    if not is_number(row["low"]):
        return tables.DASH
    between = " to " if row["low"] < 0 else "–"
    return f"{row['low']:.1f}{between}{row['high']:.1f}"


# the columns of the Markdown table
_SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "metric": lambda row: row["metric"] + (" ↓" if paper.lower_is_better(row["metric"]) else ""),
    "system": lambda row: row["system"],
    "ours": lambda row: tables.number_text(row["ours"]) + (" †" if row["other_dataset"] else ""),
    "95 % interval": _interval,
    "n": lambda row: f"{int(row['n']):,}" if is_number(row["n"]) else tables.DASH,
    "paper": lambda row: tables.number_text(row["paper"]),
    "published": lambda row: tables.number_text(row["published"]),
    # adding zero makes -0.0 a plain zero
    "difference": lambda row: (
        f"{round(row['difference'], 1) + 0.0:+.1f}" if is_number(row["difference"]) else tables.DASH
    ),
    "p": lambda row: tables.p_text(row["p"]) if is_number(row["p"]) else tables.DASH,
}


def make(number: str, results: Path, ours: Ours, *, pocket: bool) -> Made | None:
    """One of the paper's tables, as data and as Markdown; None where nothing has been measured.

    Args:
        number: one of `NUMBERS`.
        results: the folder of runs, benchmarks and trained experts.
        ours: our numbers, for the tables that compare systems.
        pocket: whether the table is the pocket family's, not the real models'.
    """
    if number in MAKERS:
        return MAKERS[number](results, pocket=pocket)
    table = build(number, ours, pocket=pocket)
    return Made(table, to_markdown(table)) if len(table) else None


def write(number: str, results: Path, ours: Ours, *, pocket: bool) -> Path | None:
    """Writes <results>/tables/table<number>.md and .csv; the pocket family's are pocket_table...

    Args:
        number, results, ours, pocket: as in `make`.

    Returns:
        The Markdown file; None where nothing has been measured.
    """
    made = make(number, results, ours, pocket=pocket)
    if made is None:
        return None
    path = results / "tables" / f"{'pocket_' if pocket else ''}table{number}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.markdown)
    made.data.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    return path
