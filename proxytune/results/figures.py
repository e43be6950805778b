"""The paper's figures, and ours, from stored numbers; readable in grey and in print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import patheffects
from matplotlib.figure import Figure

ACCENT, GREY, DARK = "#1f5fa8", "#9a9a9a", "#222222"
# line, marker and grey level differ, so that colour carries nothing alone
_STYLES = (
    (ACCENT, "-", "o"),
    (DARK, "--", "s"),
    (GREY, "-.", "^"),
    ("#6b8fb5", ":", "D"),
    ("#555555", (0, (6, 2, 1, 2, 1, 2)), "v"),
    ("#7fa6d1", (0, (3, 1)), "P"),
    ("#000000", (0, (1, 1)), "X"),
)

# markers along a curve: enough to tell it from others in grey
_MARKS = 25
# drawn below a dark line, to be seen on a dark bar as well as beside it
_HALO = [patheffects.withStroke(linewidth=3, foreground="white")]


def alpha_curve(sweep: pd.DataFrame, labels: Mapping[str, str], title: str = "") -> Figure:
    """Figure 2: metrics over alpha, with 95 % intervals where they are known.

    Args:
        sweep: rows of one task of `analysis.alpha_sweep`; values in 0..1.
        labels: metric -> its name in the legend; other metrics are left out.
        title: above the axes.
    """
    figure, axes = _axes(5.0, 3.4)
    for (metric, label), (colour, line, marker) in zip(labels.items(), _STYLES, strict=False):
        rows: Any = sweep[sweep["metric"] == metric]
        x, y = rows["alpha"].to_numpy(float), 100 * rows["value"].to_numpy(float)
        axes.plot(x, y, linestyle=line, marker=marker, color=colour, label=label, markersize=4)
        low, high = (100 * rows[c].to_numpy(float) for c in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xticks(sorted(set(sweep["alpha"].tolist())))
    axes.set_xlabel("alpha")
    axes.set_ylabel("%")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return figure


def changed_by_position(shares: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Figure 3: the share of tokens that proxy-tuning changes, over the position.

    Args:
        shares: name -> `analysis.changed_by_position`.
        title: above the axes.
    """
    figure, axes = _axes(5.0, 3.2)
    for (name, rows), (colour, line, marker) in zip(shares.items(), _STYLES * 9, strict=False):
        x, y = rows["position"].tolist(), (100 * rows["share"]).tolist()
        every = max(1, len(x) // _MARKS)
        look = {"linestyle": line, "marker": marker, "markevery": every, "markersize": 3.5}
        axes.plot(x, y, color=colour, label=name, linewidth=1.3, **look)
    axes.set_xlabel("position in the completion")
    axes.set_ylabel("tokens changed, %")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def gap_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """The gap closed per task with its interval, and the paper's as a diamond.

    Args:
        table: a comparison (`comparison.comparison`).
        title: above the axes.
    """
    rows: Any = table[table["headline"].astype(bool) & table["gap_closed"].notna()]
    names = rows["task"].tolist()[::-1]
    values = rows["gap_closed"].to_numpy(float)[::-1]
    figure, axes = _axes(5.6, 0.9 + 0.42 * len(names))
    axes.barh(names, values, color=ACCENT, height=0.55)
    for index, (value, low, high) in enumerate(
        zip(
            values,
            *(rows[f"gap_closed_{e}"].to_numpy(float)[::-1] for e in ("low", "high")),
            strict=True,
        )
    ):
        if low == low:
            line = {"linewidth": 1.2, "marker": "|", "path_effects": _HALO}
            axes.plot([low, high], [index, index], color=DARK, **line)
        axes.annotate(
            f"{value:.0f}",
            (min(value, 0), index),
            xytext=(-4, 0),
            ha="right",
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if "paper_gap_closed" in rows:
        theirs = rows["paper_gap_closed"].to_numpy(float)[::-1]
        axes.plot(
            theirs,
            range(len(names)),
            "D",
            markerfacecolor="white",
            color=DARK,
            label="the paper",
            markersize=5,
            linestyle="none",
        )
        axes.legend(frameon=False, fontsize=8)
    axes.axvline(100, color=GREY, linewidth=0.8, linestyle="--")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", pad=26, length=0)
    axes.set_xlabel("gap closed, %")
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes <stem>.png and <stem>.pdf; the same data gives the same bytes.

    Returns:
        The two files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    figure.savefig(png, dpi=200, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None})
    plt.close(figure)
    return [png, pdf]


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
