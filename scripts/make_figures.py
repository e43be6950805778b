"""Draws the paper's figures from stored runs, as PNG and PDF, with their numbers as CSV.

    python scripts/make_figures.py                       every figure
    python scripts/make_figures.py --figure 2            alpha (2), changed tokens (3), gaps (gaps)
    python scripts/make_figures.py --figure 3 --pocket   the pocket family's

Figures go to results/figures. Without the runs, it draws the committed CSV.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.cli.guard import guarded
from proxytune.files import ROOT
from proxytune.results import analysis, figures, paper
from proxytune.results.comparison import records
from proxytune.results.folder import read_csv
from proxytune.results.paper_tables_other import traced
from proxytune.results.run_json import read_run_json

FIGURES = ("2", "3", "gaps")
_POSITIONS = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--figure", action="append", choices=FIGURES, help="default: all")
    parser.add_argument("--pocket", action="store_true", help="of the pocket family")
    parser.add_argument("--task", help="of figure 2; default: the open TruthfulQA task")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="default: results/")
    options = parser.parse_args(arguments)
    for name in options.figure or FIGURES:
        if name == "2":
            drawn = figure2(options.results, options.task, pocket=options.pocket)
        elif name == "3":
            drawn = figure3(options.results, pocket=options.pocket)
        else:
            drawn = gaps(options.results, pocket=options.pocket)
        for path in drawn:
            print(path)
        if not drawn:
            print(f"figure {name}: nothing has been measured for it yet")


def figure2(results: Path, task: str | None = None, *, pocket: bool) -> list[Path]:
    """Metrics of one task over alpha, from the runs of the experiment with the most alphas."""
    stem = _stem(results, "fig2", pocket)
    folders = [
        path.parent
        for path in sorted((results / "runs").rglob("run.json"))
        if pocket == (_size(path) == paper.POCKET_SIZE)
    ]
    sweep: Any = analysis.alpha_sweep(folders)
    wanted = [t for t in sweep["task"] if paper.key_of(t, "info_true") == "truthfulqa_info_true"]
    chosen = task or next(iter(wanted), None)
    points = sweep[sweep["task"] == chosen]
    counts = points.groupby("experiment", sort=False)["alpha"].nunique()
    points = points[points["experiment"] == (counts.idxmax() if len(counts) else None)]
    # of several runs with the same alpha, keep the one with the most examples
    points = points.sort_values("n", ascending=False, kind="stable")
    points = points.drop_duplicates(["metric", "alpha"]).sort_values(["metric", "alpha"])
    if points["alpha"].nunique() > 1:
        _write(points.round({"value": 6, "low": 6, "high": 6}), stem)
    if not stem.with_suffix(".csv").is_file():
        return []
    # pandas would read the metric "true" as a truth value
    rows: Any = pd.read_csv(stem.with_suffix(".csv"), dtype={"metric": str})
    labels = {"true": "true", "info": "informative", "info_true": "both"}
    measured: list[str] = list(dict.fromkeys(rows["metric"].tolist()))
    known = {m: labels.get(m) or m for m in measured if "/" not in m}
    title = f"{rows['experiment'].iloc[0]}, {rows['task'].iloc[0]}"
    return figures.save(figures.alpha_curve(rows, known, title), stem)


def figure3(results: Path, *, pocket: bool) -> list[Path]:
    """The share of tokens changed by position, one line per task with its overall share."""
    stem = _stem(results, "fig3", pocket)
    found = []
    for run, task, texts in traced(results / "runs", pocket=pocket):
        by_position = analysis.changed_by_position(texts, _POSITIONS)
        overall = analysis.changed_share(texts)
        print(f"{run.name}, {task}: {100 * overall:.1f} % of the tokens changed")
        found.append(by_position.assign(run=run.name, task=task, overall=overall))
    if found:
        _write(pd.concat(found).round(6), stem)
    if not stem.with_suffix(".csv").is_file():
        return []
    rows = pd.read_csv(stem.with_suffix(".csv"))
    groups: dict[str, Any] = {str(name): group for name, group in rows.groupby("task", sort=False)}
    shares = {f"{n} ({100 * g['overall'].iloc[0]:.1f} %)": g for n, g in groups.items()}
    return figures.save(figures.changed_by_position(shares), stem)


def gaps(results: Path, *, pocket: bool) -> list[Path]:
    """The gaps closed, a figure for each committed comparison of several tasks."""
    drawn = []
    for path in sorted((results / "metrics").glob("*.csv")):
        table: Any = read_csv(path)
        if pocket != (table["paper_size"].iloc[0] == paper.POCKET_SIZE):
            continue
        bars = sum(bool(row["headline"]) for row in records(table))
        if bars > 1 and "gap_closed" in table and table["gap_closed"].notna().any():
            stem = results / "figures" / f"gaps_{path.stem}"
            drawn += figures.save(figures.gap_bars(table, path.stem), stem)
    return drawn


def _stem(results: Path, name: str, pocket: bool) -> Path:
    return results / "figures" / f"{'pocket_' if pocket else ''}{name}"


def _size(run_json: Path) -> str | None:
    return (read_run_json(run_json.parent)["config"].get("paper") or {}).get("size")


def _write(rows: pd.DataFrame, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(stem.with_suffix(".csv"), index=False)


if __name__ == "__main__":
    guarded(main, again="")
