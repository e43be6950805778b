"""Draws the paper's figures and our own from stored numbers, readable in grey and in print."""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.text import Text

from proxytune.results.curves import Curve

ACCENT, GREY, DARK = "#1f5fa8", "#9a9a9a", "#222222"
_BLACK, _GRID = "#000000", "#e6e6e6"
_ACCENT = f"var(--accent, {ACCENT})"  # of a page
# curves differ in line, marker and grey level: a reader can tell them apart without colour
_STYLES = (
    (ACCENT, "-", "o"),
    (DARK, "--", "s"),
    (GREY, "-.", "^"),
    ("#6b8fb5", ":", "D"),
    ("#555555", (0, (6, 2, 1, 2, 1, 2)), "v"),
    ("#7fa6d1", (0, (3, 1)), "P"),
    (_BLACK, (0, (1, 1)), "X"),
)

_GAP_COLUMNS = ("gap_closed", "gap_closed_low", "gap_closed_high", "paper_gap_closed")
_GAP_WIDTH = 3.75  # inches: the width of a phone, where a letter of 10 points is 13 pixels high

# lines without marks: (dashes, width)
_FLAT = (("-", 0.8), ("--", 0.9), (":", 1.2), ("-.", 0.9))
_TICKS = 12  # more values of a setting get matplotlib's own ticks
# how many markers a curve has: enough to tell curves apart in grey
_MARKS = 25
# a white edge makes dark lines visible on a bar as well as beside it
_HALO = [patheffects.withStroke(linewidth=3, foreground="white")]


def alpha_curve(sweep: pd.DataFrame, labels: Mapping[str, str], title: str = "") -> Figure:
    """Figure 2: metrics over alpha, with their 95 % intervals.

    Args:
        sweep: rows of one task of `analysis.alpha_sweep`; values in 0..1.
        labels: metric -> its name in the legend; the figure leaves out other metrics.
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
    _plain(axes.legend(frameon=False, fontsize=9).get_texts())
    return figure


def setting_curves(lines: Sequence[Curve], setting: str, unit: str) -> Figure:
    """A metric over a setting, curves with their 95 % intervals; the other systems lie flat.

    Args:
        lines: see `curves.curves`.
        setting: the axis' name.
        unit: the metric's name, and its unit.
    """
    figure, axes = _axes(4.2, 3.4)
    flat = [line for line in lines if not line.x]
    curved = (line for line in lines if line.x)
    for line, (colour, dashes, marker) in zip(curved, cycle(_STYLES), strict=False):
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": line.label}
        axes.plot(line.x, line.y, marker=marker, markersize=4, **look)
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    for line, (dashes, width) in zip(flat, cycle(_FLAT), strict=False):
        axes.axhline(line.y[0], color=DARK, linestyle=dashes, linewidth=width, label=line.label)
    places = sorted({x for line in lines for x in line.x})
    if len(places) <= _TICKS:
        axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.set_xlabel(setting, parse_math=False)
    axes.set_ylabel(unit, parse_math=False)
    beside = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _plain(beside.get_texts())
    return figure


def changed_by_position(shares: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Figure 3: the share of tokens that proxy-tuning changes, over the position.

    Args:
        shares: name -> `analysis.changed_by_position`.
        title: above the axes.
    """
    figure, axes = _axes(5.0, 3.2)
    for (name, rows), (colour, line, marker) in zip(shares.items(), cycle(_STYLES), strict=False):
        x, y = rows["position"].tolist(), (100 * rows["share"]).tolist()
        every = max(1, len(x) // _MARKS)
        look = {"linestyle": line, "marker": marker, "markevery": every, "markersize": 3.5}
        axes.plot(x, y, color=colour, label=name, linewidth=1.3, **look)
    axes.set_xlabel("position in the completion")
    axes.set_ylabel("tokens changed, %")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)
    _plain(axes.legend(frameon=False, fontsize=8).get_texts())
    return figure


def gap_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """The gap closed per task with its interval, and the paper's as a diamond.

    Each name stands above its bar: that makes the figure narrow enough for a phone without smaller
    letters. The axis ends at -100 and 200 %; values beyond it are drawn at its edge. A bar without
    an interval is hollow: base and tuned may be equal there, and the ratio anything.

    Args:
        table: a comparison (`comparison.comparison`) with at least one gap closed.
        title: above the axes.
    """
    rows: Any = table[table["headline"].astype(bool) & table["gap_closed"].notna()]
    rows = rows.reindex(columns=["task", *_GAP_COLUMNS])
    values, lows, highs, theirs = (rows[column].to_numpy(float) for column in _GAP_COLUMNS)
    ends = np.concatenate([values, highs, theirs, [0, 110]])
    left, right = max(np.nanmin(ends), -100), min(np.nanmax(ends), 200)
    places = np.arange(len(rows))

    figure, axes = _axes(_GAP_WIDTH, 0.7 + 0.48 * len(rows))
    axes.set_xlim(left, right)
    axes.set_ylim(len(rows) - 0.65, -0.75)
    faces = np.where(np.isnan(lows), "none", ACCENT)
    axes.barh(places, values, color=faces, edgecolor=ACCENT, height=0.4)
    for x, look in ((0, "-"), (100, "--")):
        at = np.full(len(rows), x)
        axes.vlines(at, places - 0.26, places + 0.26, DARK, linestyles=look, linewidths=0.9)
    whiskers = {"color": DARK, "linewidth": 1.2, "marker": "|", "path_effects": _HALO}
    for place, whisker in zip(places, np.clip([lows, highs], left, right).T, strict=True):
        axes.plot(whisker, [place, place], clip_on=False, **whiskers)
    for place, name, value, low in zip(places, rows["task"], values, lows, strict=True):
        words: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        words |= {"fontsize": 10, "parse_math": False}
        axes.text(0, place - 0.45, str(name), ha="left", **words)
        said = f"{value:.1f}, no interval" if np.isnan(low) else f"{value:.1f}"
        axes.text(1, place - 0.45, said, ha="right", **words)
    if not np.isnan(theirs).all():
        diamonds = {"marker": "D", "markersize": 5.5, "markerfacecolor": "white", "color": DARK}
        shown = np.clip(theirs, left, right)
        axes.plot(shown, places, linestyle="none", clip_on=False, label="the paper", **diamonds)
        figure.legend(loc="lower right", frameon=False, fontsize=10, borderpad=0)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([x for x in (-100, -50, 0, 50, 100, 150, 200) if left <= x <= right])
    axes.set_xlabel("gap closed, %", loc="left")
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for an HTML page; closes the figure.

    Letters stay text. Dark lines and letters take the page's text colour, blue ones its accent, and
    the ground is transparent, so the figure suits a light page and a dark one. The same data gives
    the same text.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "proxytune"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(f"stroke: {_GRID}", "stroke: currentColor; stroke-opacity: 0.15")
    for colour, name in ((DARK, "currentColor"), (_BLACK, "currentColor"), (ACCENT, _ACCENT)):
        text = text.replace(colour, name)
    return text


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


def _plain(texts: Iterable[Text]) -> None:
    """Takes a dollar sign of a task's name for what it is: no formula begins there."""
    for text in texts:
        text.set_parse_math(False)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
