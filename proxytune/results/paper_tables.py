"""The paper's tables with our numbers in them: ours, the paper's, the published runs', difference.

Ours come from comparison tables on disk (`folder.to_csv`), so building one costs seconds and no
model. Everything is in percent.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.files import ROOT
from proxytune.results import analysis, paper, stats, tables
from proxytune.results.comparison import records, systems_of
from proxytune.results.folder import read_csv, to_csv

GAP = "gap closed"
AVERAGE = "average"
NUMBERS = ("2", "3", "4", "5", "6", "7", "12", "14", "15")
# below this many tokens, types that come 100 times hardly exist
_FEW_TOKENS = 50_000
_SIZES = ("13B", "70B")
# what an average gap closed makes sense of: Table 3's gaps lie between nearly equal systems
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
)
# pairs of systems whose difference is tested on the same examples
_OF_TUNED = ("tuned", "gap_closed", "vs_tuned")
_PAIRS = {f"proxy − {other}": other for other in ("expert", "tuned")}


@dataclass(frozen=True)
class Cell:
    """One of our numbers, in percent.

    Attributes:
        value: the number.
        low, high: its 95 % interval.
        n: how many examples it rests on.
        p: of a difference between systems: the p-value of "none".
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    p: float | None = None


# (table, size, the paper's metric, system, pair or `GAP`) -> our number
Ours = dict[tuple[str, str, str, str], Cell]


def collect(runs: Path, metrics: Path) -> list[Path]:
    """Copies the comparison tables of finished runs to where they are committed.

    Tasks of smoke runs and unfinished ones are left out, and so are variants of an experiment
    (another alpha, a traced run), whose folder is not named like the experiment.

    Args:
        runs: the folder of results folders.
        metrics: the folder of committed tables.

    Returns:
        The files written.
    """
    written = []
    for path in sorted(runs.glob("*/table.csv")):
        run = path.with_name("run.json")
        name = json.loads(run.read_text())["name"] if run.is_file() else None
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
    """Our numbers from one comparison table that names its place in the paper."""
    ours: Ours = {}
    names = {s: s for s in systems_of(table)} | {GAP: "gap_closed"}
    names |= {pair: f"vs_{other}" for pair, other in _PAIRS.items()}
    for row in records(table):
        key = paper.key_of(str(row["task"]), str(row["metric"]))
        if key is None or not isinstance(row.get("paper_table"), str):
            continue
        number, size = row["paper_table"], str(row["paper_size"])
        for target in paper.tables_filled_by(number, size):
            for name, column in names.items():
                if key not in paper.TABLES[target] or not _known(row.get(column)):
                    continue
                if (number, target) == ("5", "15") and column in _OF_TUNED:
                    continue  # Table 15's is tuned with LoRA, by runs of its own
                own: Any = row.get(f"{column}_n")
                ours[target, size, key, name] = Cell(
                    row[column],
                    _or_none(row.get(f"{column}_low")),
                    _or_none(row.get(f"{column}_high")),
                    int(own if _known(own) else row["n"]),
                    _or_none(row.get(f"{column}_p")),
                )
    return ours


def from_rescored(rows: Sequence[Mapping[str, Any]]) -> Ours:
    """The authors' runs as scored by us (`scripts/rescore.py --json`) in the place of ours."""
    scored = {(f"{r['benchmark']}/{r['system']}", r["metric"]): r["ours"] for r in rows}
    ours: Ours = {}
    for row in records(paper.published()):
        value = scored.get((row["run"], row["run_metric"]))
        if value is None:
            continue
        scale = 1 if row["metric"] == "alpacafarm_win_rate" else 100
        system, sizes = row["system"], (row["size"],)
        if row["size"] == "7B":  # one small expert serves both sizes
            system, sizes = "expert", _SIZES
        if system == "lora":
            system = "tuned"
        for size in sizes:
            ours[row["table"], size, row["metric"], system] = Cell(scale * value)
    return ours


def build(number: str, ours: Ours, *, pocket: bool = False) -> pd.DataFrame:
    """One table of the paper: a row per size, metric and system, then gaps closed.

    Args:
        number: a key of `paper.TABLES`.
        ours: our numbers; may be empty.
        pocket: the pocket family's rows instead of the paper's sizes.

    Returns:
        Columns table, size, metric, system, ours, low, high, n, paper, published, difference
        (ours - paper), p (of a pair of systems, tested on the same examples); a number that does
        not exist is not-a-number.

    Raises:
        ValueError: an unknown table.
    """
    if number not in paper.TABLES:
        raise ValueError(f"no table {number} of results; there are {', '.join(paper.TABLES)}")
    sizes = (paper.POCKET_SIZE,) if pocket else ("-",) if number == "7" else _SIZES
    rows: list[dict[str, Any]] = []
    for size in sizes:
        gaps: list[dict[str, Any]] = []
        for key in paper.TABLES[number]:
            rows += _metric_rows(number, size, key, ours)
            gaps.append(_gap_row(number, size, key, rows, ours))
        gaps = [row for row in gaps if any(_known(row[c]) for c in ("ours", "paper", "published"))]
        rows += gaps
        if len(gaps) > 1 and number in _AVERAGED:
            rows.append(_average(number, size, gaps))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def to_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown; a column in which a size has no number is left out."""
    number = str(table["table"].iloc[0])
    compared = any(_known(row["difference"]) for row in records(table))
    parts = [
        f"# Table {number}",
        "Percent." + (" Difference: ours − the paper's." if compared else ""),
    ]
    for size, group in table.groupby("size", sort=False):
        rows = records(group)
        columns = {name: [show(row) for row in rows] for name, show in _SHOWN.items()}
        known = {name: cells for name, cells in columns.items() if set(cells) != {_DASH}}
        body = [list(cells) for cells in zip(*known.values(), strict=True)]
        heading = "" if size == "-" else f"## {size}"
        parts += [heading, tables.markdown_table(list(known), body, right_from=2)]
        stated = paper.AVERAGE_GAP_CLOSED.get((number, str(size)))
        if stated is not None:
            parts.append(f"The paper states an average gap closed of {stated} %.")
    return "\n\n".join(p for p in parts if p) + "\n"


def _metric_rows(number: str, size: str, key: str, ours: Ours) -> list[dict[str, Any]]:
    rows = []
    for system in tables.SYSTEMS:
        cell = ours.get((number, size, key, system))
        theirs = paper.cell(number, size, system, key)
        published = paper.cell(number, size, system, key, "published")
        if cell or theirs is not None or published is not None:
            rows.append(_line(number, size, key, system, cell, theirs, published))
    for pair, other in _PAIRS.items():
        cell = ours.get((number, size, key, pair))
        if cell:
            proxy = (paper.cell(number, size, "proxy", key, s) for s in ("paper", "published"))
            theirs = (paper.cell(number, size, other, key, s) for s in ("paper", "published"))
            apart = [
                None if a is None or b is None else a - b
                for a, b in zip(proxy, theirs, strict=True)
            ]
            rows.append(_line(number, size, key, pair, cell, *apart))
    return rows


def _gap_row(
    number: str, size: str, key: str, rows: Sequence[Mapping[str, Any]], ours: Ours
) -> dict[str, Any]:
    """The gap closed of one metric: ours, from the paper's cells, from the published runs'."""
    cells = {r["system"]: r for r in rows if (r["size"], r["metric"]) == (size, key)}

    def gap(column: str) -> float | None:
        values = [cells.get(s, {}).get(column) for s in ("base", "proxy", "tuned")]
        if not all(_known(v) for v in values):
            return None
        share = stats.gap_closed(*map(float, values))  # pyright: ignore[reportArgumentType]
        return None if share is None else 100 * share

    mine = ours.get((number, size, key, GAP))
    value = gap("ours")
    if mine is None and value is not None:
        mine = Cell(value)
    return _line(number, size, key, GAP, mine, gap("paper"), gap("published"))


def _average(number: str, size: str, gaps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, float | None] = {}
    for column in ("ours", "paper", "published"):
        values = [row[column] for row in gaps]
        means[column] = sum(values) / len(values) if all(map(_known, values)) else None
    mine = None if means["ours"] is None else Cell(means["ours"])
    return _line(number, size, AVERAGE, GAP, mine, means["paper"], means["published"])


def _line(
    number: str,
    size: str,
    key: str,
    system: str,
    cell: Cell | None,
    theirs: float | None,
    published: float | None,
) -> dict[str, Any]:
    values = [
        number,
        size,
        key,
        system,
        cell and cell.value,
        cell and cell.low,
        cell and cell.high,
        cell and cell.n,
        theirs,
        published,
        cell.value - theirs if cell and theirs is not None else None,
        cell and cell.p,
    ]
    return {c: math.nan if v is None else v for c, v in zip(_COLUMNS, values, strict=True)}


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _or_none(value: Any) -> float | None:
    return float(value) if _known(value) else None


def _text(value: Any) -> str:
    return f"{value:.1f}" if _known(value) else _DASH


def _interval(row: Mapping[str, Any]) -> str:
    if not _known(row["low"]):
        return _DASH
    between = " to " if row["low"] < 0 else "–"
    return f"{row['low']:.1f}{between}{row['high']:.1f}"


_DASH = "–"
# the columns of the Markdown table
_SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "metric": lambda row: row["metric"] + (" ↓" if paper.lower_is_better(row["metric"]) else ""),
    "system": lambda row: row["system"],
    "ours": lambda row: _text(row["ours"]),
    "95 % interval": _interval,
    "n": lambda row: f"{int(row['n']):,}" if _known(row["n"]) else _DASH,
    "paper": lambda row: _text(row["paper"]),
    "published": lambda row: _text(row["published"]),
    # adding zero makes -0.0 a plain zero
    "difference": lambda row: (
        f"{round(row['difference'], 1) + 0.0:+.1f}" if _known(row["difference"]) else _DASH
    ),
    "p": lambda row: tables.p_text(row["p"]) if _known(row["p"]) else _DASH,
}


# -- tables of their own kind --------------------


def table6(results: Path, *, pocket: bool) -> tuple[pd.DataFrame, str] | None:
    """The tokens that proxy-tuning promotes most on open questions, and the test on equations."""
    rows: list[dict[str, Any]] = []
    parts = ["# Table 6", "Tokens that proxy-tuning promotes most; mean of p_proxy − p_base."]
    for run, task, texts in traced(results / "runs", pocket=pocket):
        key = paper.key_of(task, "info_true") or paper.key_of(task, "acc")
        pieces = analysis.load_pieces(run)
        if pieces is None:
            print(f"{run}: its tokenizer is not here, so its tokens have no names")
            continue
        if key == "truthfulqa_info_true":
            least = 100 if sum(len(text.ids) for text in texts) >= _FEW_TOKENS else 10
            found = analysis.most_promoted(texts, pieces, min_count=least)
            rows += [{"run": run.name, "task": task} | asdict(p) for p in found]
            body = [[p.token, f"{p.mean_delta:+.3f}", str(p.count), f"`{p.ngram}`"] for p in found]
            head = ["token", "mean rise", "count", "commonest 4-gram"]
            parts += [f"## {run.name}, {task}: types chosen at least {least} times"]
            parts += [tables.markdown_table(head, body, 1)]
        if key == "gsm_acc":
            test = analysis.compare_sides(texts, pieces)
            parts += [
                f"## {run.name}, {task}: equations (section 6.1)",
                f"Left-hand sides {test.left_mean:.3f} ({test.left_tokens:,} tokens), right-hand "
                f"sides {test.right_mean:.3f} ({test.right_tokens:,} tokens), Welch's t = "
                f"{test.t:.2f}, p = {test.p_value:.2g}. The paper, at 13B: 0.131 (14,104), 0.056 "
                "(16,452), p < 1e-4.",
            ]
    return (pd.DataFrame(rows), "\n\n".join(parts) + "\n") if len(parts) > 2 else None


def traced(runs: Path, *, pocket: bool) -> Iterator[tuple[Path, str, list[analysis.Moves]]]:
    """The traced proxy completions of the runs that belong to the paper's Table 2."""
    for path in sorted(runs.glob("*/run.json")):
        config = json.loads(path.read_text())["config"]
        place = config.get("paper") or {}
        if place.get("table") != "2" or pocket != (place["size"] == paper.POCKET_SIZE):
            continue
        for task in config["task"]:
            texts = analysis.read_moves(path.parent / task / "proxy")
            if texts:
                yield path.parent, task, texts


def table12(results: Path, *, pocket: bool) -> tuple[pd.DataFrame, str] | None:
    """Seconds per generation, and the ratio of proxy to tuned beside the paper's."""
    path = results / "bench" / f"{'pocket_' if pocket else ''}table12.json"
    if not path.is_file():
        return None
    bench = json.loads(path.read_text())
    numbers = paper.numbers()
    theirs = {
        (r["size"], r["system"], r["metric"]): r["value"]
        for r in records(numbers)
        if r["table"] == "12"
    }
    rows = []
    for name, seconds in bench["table12_seconds"].items():
        lengths = name.replace(" ", "").strip("()")
        row = {"prompt,output": lengths, "tuned_s": seconds["tuned"], "proxy_s": seconds["proxy"]}
        row["ratio"] = bench["table12_proxy_over_tuned"][name]
        for size in ("13B", "70B"):
            metric = f"s_per_generation({lengths})"
            if (size, "tuned", metric) in theirs:
                ratio = theirs[size, "proxy", metric] / theirs[size, "tuned", metric]
                row[f"paper_{size}"] = ratio
        rows.append(row)
    table = pd.DataFrame(rows)
    hardware = bench["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    head = ["prompt, output tokens", "tuned, s", "proxy, s", "proxy / tuned", "paper 13B", "70B"]
    body = [
        [str(r["prompt,output"]), f"{r['tuned_s']:.3f}", f"{r['proxy_s']:.3f}"]
        + [f"{r[c]:.2f}×" if c in r else "–" for c in ("ratio", "paper_13B", "paper_70B")]
        for r in records(table)
    ]
    text = (
        f"# Table 12\n\nSeconds per generation at batch 1 ({bench['size']} random models, {where}; "
        f"the paper: A100s).\n\n{tables.markdown_table(head, body, 1)}\n"
    )
    return table, text


def table14(results: Path, *, pocket: bool) -> tuple[pd.DataFrame, str] | None:
    """Training time of the finished trainings, beside the paper's."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("experts/*/train.json")):
        record = json.loads(path.read_text())
        config, hardware = record["config"], record["environment"]["hardware"]
        of_pocket = Path(ROOT, config["model"]).is_relative_to(ROOT / "pocket")
        if record.get("status") != "finished" or pocket != of_pocket:
            continue
        kind = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['processor']} core"
        rows.append(
            {
                "model": config["model"],
                "tuning": config["method"],
                "data": config["data"],
                "examples": record["data"]["examples"],
                "steps": record["steps"],
                "tokens": record["tokens"],
                "seconds": record["seconds"],
                "devices": f"{record['devices']} x {kind}",
                "paper_hours": paper.training_hours(
                    config["model"], config["method"], config["data"]
                ),
            }
        )
    if not rows:
        return None
    body = [[shown(row) for shown in _SHOWN_14.values()] for row in rows]
    text = (
        "# Table 14\n\nTraining time on the clock, loading and saving left out; the paper's on its "
        f"own machines.\n\n{tables.markdown_table(list(_SHOWN_14), body, 3)}\n"
    )
    return pd.DataFrame(rows), text


def _duration(seconds: float) -> str:
    if not seconds:
        return "–"
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{minutes // 60} h {minutes % 60:02} min"


_SHOWN_14: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: row["model"],
    "tuning": lambda row: row["tuning"],
    "data": lambda row: row["data"],
    "examples": lambda row: f"{row['examples']:,}",
    "steps": lambda row: f"{row['steps']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "time": lambda row: _duration(row["seconds"]),
    "on": lambda row: row["devices"],
    "the paper": lambda row: _duration(3600 * (row["paper_hours"] or 0)),
}


_OF_THEIR_OWN = {"6": table6, "12": table12, "14": table14}


def make(
    number: str, results: Path, ours: Ours, *, pocket: bool
) -> tuple[pd.DataFrame, str] | None:
    """One of the paper's tables, as data and as Markdown; None where nothing has been measured.

    Args:
        number: one of `NUMBERS`.
        results: the folder of runs, benchmarks and trained experts.
        ours: our numbers, for the tables that compare systems.
        pocket: the pocket family's table, not the real models'.
    """
    if number in _OF_THEIR_OWN:
        return _OF_THEIR_OWN[number](results, pocket=pocket)
    table = build(number, ours, pocket=pocket)
    return (table, to_markdown(table)) if len(table) else None
