import math

import pandas as pd
import pytest
from matplotlib import colors

from proxytune.results import figures


def sweep():
    rows = [
        {"alpha": a, "metric": m, "value": v + a / 10, "low": v, "high": v + 0.3}
        for a in (0.5, 1.0, 1.5)
        for m, v in (("true", 0.5), ("info", 0.6))
    ]
    return pd.DataFrame(rows)


def gaps():
    return pd.DataFrame(
        {
            "task": ["gsm8k", "toxigen", "average"],
            "headline": [True, True, True],
            "gap_closed": [75.0, math.nan, 75.0],
            "gap_closed_low": [50.0, math.nan, math.nan],
            "gap_closed_high": [90.0, math.nan, math.nan],
            "paper_gap_closed": [76.7, 99.9, 88.3],
        }
    )


def test_the_alpha_curve_draws_the_values_in_percent():
    axes = figures.alpha_curve(sweep(), {"true": "true", "info": "informative"}).axes[0]
    assert [line.get_label() for line in axes.lines] == ["true", "informative"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([55, 60, 65])
    assert list(axes.lines[0].get_xdata()) == [0.5, 1.0, 1.5]


def test_lines_differ_without_colour():
    axes = figures.alpha_curve(sweep(), {"true": "true", "info": "informative"}).axes[0]
    looks = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 2
    greys = [sum(colors.to_rgb(line.get_color())) / 3 for line in axes.lines]
    assert abs(greys[0] - greys[1]) > 0.1


def test_changed_tokens_draw_a_line_per_task():
    table = pd.DataFrame({"position": [1, 2], "tokens": [3, 2], "share": [0.5, 0.25]})
    axes = figures.changed_by_position({"gsm8k": table, "toxigen": table}).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[50, 25], [50, 25]]


def test_gap_bars_leave_out_what_has_no_gap():
    axes = figures.gap_bars(gaps()).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [75, 75]


def test_gap_bars_cut_off_what_is_far_away():
    table = pd.DataFrame(
        {
            "task": ["a", "b"],
            "headline": [True, True],
            "gap_closed": [950.0, -40.0],
            "gap_closed_low": [-500.0, math.nan],
            "gap_closed_high": [4000.0, math.nan],
            "paper_gap_closed": [-300.0, math.nan],
        }
    )
    axes = figures.gap_bars(table).axes[0]
    assert axes.get_xlim() == (-100, 200)
    whisker, _, diamonds = (list(line.get_xdata()) for line in axes.lines)
    assert whisker == [-100, 200] and diamonds[0] == -100
    assert {"950.0", "-40.0, no interval"} <= {text.get_text() for text in axes.texts}
    assert [bar.get_facecolor()[3] for bar in axes.patches] == [1, 0]  # the second one is hollow


def test_a_figure_in_a_page_takes_the_pages_ink_and_escapes_names():
    table = gaps().assign(task=["<b>$x$</b>", "toxigen", "average"])
    text = figures.svg(figures.gap_bars(table))
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>")
    assert "&lt;b&gt;$x$&lt;/b&gt;" in text and "currentColor" in text
    assert figures.DARK not in text and "#000000" not in text
    assert text == figures.svg(figures.gap_bars(table))


def test_figures_are_saved_twice_and_reproducibly(tmp_path):
    first = [p.read_bytes() for p in figures.save(figures.gap_bars(gaps()), tmp_path / "a.b")]
    again = [p.read_bytes() for p in figures.save(figures.gap_bars(gaps()), tmp_path / "c.d")]
    assert {p.name for p in tmp_path.iterdir()} == {"a.b.png", "a.b.pdf", "c.d.png", "c.d.pdf"}
    assert first == again
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")
