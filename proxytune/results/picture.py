"""One picture of a run: an example's answers by the four systems, the proxy's tokens shaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from proxytune.errors import UserError
from proxytune.files import read_jsonl, read_rows
from proxytune.records import Completion, Score
from proxytune.results import analysis
from proxytune.results.templates import render

_SYSTEMS = ("base", "expert", "proxy", "tuned")
_WIDTH, _MARGIN, _GAP = 880, 12, 14  # of the picture, in pixels
_LINE, _LETTER = 21, 8.4  # a line's height, a letter's width
_MOST_LINES = 8
_BESIDE = 0.005  # a smaller rise is not shaded


@dataclass
class _Drawing:
    """What the template draws; places are in pixels from the upper left."""

    texts: list[dict[str, Any]] = field(default_factory=list)
    shades: list[dict[str, Any]] = field(default_factory=list)
    underlines: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Adds a text; letters keep their width whatever the font."""
        length = round(_LETTER * len(text), 1) if kind in ("", "name") else None
        self.texts.append({"x": x, "y": y, "text": text, "kind": kind, "length": length})


def picture(run: Path, task: str, example: str | None = None) -> str:
    """The picture as SVG, readable on light and dark pages.

    Args:
        run: the results folder of a traced run with the four systems.
        task: its folder's name.
        example: the example's id; None takes the first that base and expert get wrong, and proxy
            and tuned right.

    Raises:
        UserError: the run lacks a system, the traces, or such an example.
    """
    folder = run / task
    completions = {
        each: _by_id(folder / each / "completions.jsonl", Completion) for each in _SYSTEMS
    }
    scores = {each: _by_id(folder / each / "scores.jsonl", Score) for each in _SYSTEMS}
    rows = {str(row["id"]): row for row in read_rows(folder / "examples.jsonl")}
    right = {
        system: {key: next(iter(score.values.values())) == 1 for key, score in found.items()}
        for system, found in scores.items()
    }
    chosen = example or next((each for each in rows if _tells(each, right)), None)
    if chosen is None:
        raise UserError(f"{folder}: no example that proxy and tuned alone get right; name one")
    if chosen not in rows:
        raise UserError(f"{folder} has no example {chosen!r}")
    proxy = completions["proxy"][chosen]
    path = folder / "proxy" / "completions.jsonl"
    trace = (analysis.trace_of(proxy, path) or [])[: len(proxy.token_ids)]  # without the end token
    pieces = analysis.load_pieces(run)
    if not trace or pieces is None:
        raise UserError(f"{folder} has no trace of the proxy; make the run with decoding=traced")
    prompt = rows[chosen]["prompt"]
    question = shorten(str(prompt["user"] or prompt["raw"]).strip().splitlines()[-1], 100)
    width = int((_WIDTH - 2 * _MARGIN - 3 * _GAP) / 4 / _LETTER)
    texts = {each: completions[each][chosen].text for each in _SYSTEMS}
    drawing = _Drawing()
    drawing.text(_MARGIN, 24, question)
    bottom = 0
    for number, system in enumerate(_SYSTEMS):
        x = _MARGIN + number * (width * _LETTER + _GAP)
        verdict = "✓ right" if right[system][chosen] else "✗ wrong"
        drawing.text(x, 62, system, "name")
        kind = "right" if right[system][chosen] else "soft"
        drawing.text(x + width * _LETTER - 62, 62, verdict, kind)
        drawing.lines.append({"x": x, "y": 70, "width": round(width * _LETTER, 1)})
        if system == "proxy":
            bottom = max(bottom, _tokens(drawing, x, trace, pieces, width))
        else:
            bottom = max(bottom, _plain(drawing, x, texts[system], width))
    legend = "Shaded: raised by proxy-tuning. Underlined: not what the base would have written."
    height = bottom + 2 * _LINE
    drawing.text(_MARGIN, height - 12, legend, "soft")
    spoken = "; ".join(f"{each}: {text.strip()}" for each, text in texts.items())
    return str(
        render(
            "answers.svg",
            width=_WIDTH,
            height=height,
            title=question,
            description=" ".join(spoken.split()),
            **vars(drawing),
        )
    )


def _by_id(path: Path, kind: type) -> dict[str, Any]:
    """The first sample of each example, or its score."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the picture needs {', '.join(_SYSTEMS)}, scored")
    found: dict[str, Any] = {}
    for each in read_jsonl(path, kind):
        found.setdefault(each.example_id, each)
    return found


def _tells(example: str, right: dict[str, dict[str, bool]]) -> bool:
    verdicts = [right[system].get(example) for system in _SYSTEMS]
    return verdicts == [False, False, True, True]


def _plain(drawing: _Drawing, x: float, text: str, width: int) -> int:
    """Draws a text; the bottom of its last line."""
    lines = [each for line in text.strip().splitlines() for each in wrap(line, width) or [""]]
    for number, line in enumerate(lines[:_MOST_LINES]):
        drawing.text(x, 93 + number * _LINE, line)
    return 93 + len(lines[:_MOST_LINES]) * _LINE


def _tokens(drawing: _Drawing, x: float, trace: Sequence[Any], pieces: Any, width: int) -> int:
    """Draws a traced text token by token; the bottom of its last line."""
    column = line = 0
    begun = False
    for entry in trace:
        base = entry["top"].get("base") or [[entry["id"]]]
        changed = base[0][0] != entry["id"]
        rise = entry["p"][analysis.SYSTEM] - entry["p"].get("base", 0.0)
        piece = pieces(entry["id"])
        for part in piece.splitlines(keepends=True):
            shown = part.rstrip("\n") if begun else part.strip()
            begun = begun or bool(shown)
            if column and column + len(shown) > width:
                column, line = 0, line + 1
            if shown and line < _MOST_LINES:
                at = {
                    "x": round(x + column * _LETTER, 1),
                    "y": 78 + line * _LINE,
                    "width": round(len(shown) * _LETTER, 1),
                }
                if rise > _BESIDE:
                    drawing.shades.append(at | {"opacity": round(0.6 * rise, 3)})
                if changed:
                    drawing.underlines.append(at)
                drawing.text(at["x"], 93 + line * _LINE, shown)
            column += len(shown)
            if part.endswith("\n"):
                column, line = 0, line + 1
    return 93 + (min(line, _MOST_LINES - 1) + 1) * _LINE
