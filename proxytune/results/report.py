"""One self-contained HTML page per experiment: the table, figures, and every example.

Nothing on the page comes from elsewhere. The texts lie in it as gzip in base64, the traces in
blocks of a few examples each, and only the examples that are shown become part of the document;
so a page of a thousand examples opens as fast as one of ten.
"""

import base64
import gzip
import html
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from proxytune.files import read_jsonl, replace_file
from proxytune.records import Completion, Score
from proxytune.results import analysis, tables
from proxytune.results.comparison import caveat, headlines
from proxytune.results.folder import read_csv

ASSETS = Path(__file__).resolve().parent / "report_assets"
MEMBERS = ("base", "expert", "antiexpert")
# examples whose traces are unpacked together
_BLOCK = 20
# candidates of each member that a reader sees
_TOP = 3
_FIGURE_POSITIONS = 64
# fewer tokens on a side of equations say nothing
_FEW_SIDES = 30


def write_report(folder: Path) -> Path:
    """Writes <folder>/report.html from the files of a results folder.

    Args:
        folder: holds run.json, table.csv, and per task examples, completions and scores.

    Returns:
        The page.

    Raises:
        ValueError: the folder has no table yet.
    """
    if not (folder / "table.csv").is_file():
        raise ValueError(f"{folder} has no table.csv; score the run first (stage=score)")
    table = read_csv(folder / "table.csv")
    run = json.loads((folder / "run.json").read_text())
    pieces = _Vocabulary(_lazy_pieces(folder))
    payload = _Payload(folder, table, pieces)
    values = {
        "title": html.escape(str(run.get("name", folder.name))),
        "subtitle": html.escape(_subtitle(run)),
        "css": _asset("report.css"),
        "js": _asset("report.js"),
        "caveat": f'<p class="caveat">{caveat(table)}</p>' if caveat(table) else "",
        "table": tables.to_html(table),
        "aid": html.escape(tables.reading_aid(table)),
        "unparsed": f'<p class="soft">{html.escape(tables.unparsed_text(table))}</p>',
        "differences": _differences(table),
        "gaps": _gaps(table),
        "analyses": _analyses(payload, pieces),
        "legend": _LEGEND if payload.traced else "",
        "provenance": _provenance(run),
        "data": payload.scripts(),
    }
    page = Template(_asset("report.html")).substitute(values)
    path = folder / "report.html"
    replace_file(path, page.encode(errors="replace"))
    return path


_LEGEND = (
    '<p class="legend">The proxy’s tokens are shaded by how much proxy-tuning raised their'
    ' probability over the base’s: 0 <span class="swatch"></span> 1. Underlined: the base alone'
    " would have written another token. Point at a token (or tap it, or use the arrow keys) for"
    " the members’ candidates.</p>"
)


# -- examples --------------------


class _Vocabulary:
    """The token texts that a page needs, each once."""

    def __init__(self, piece: Callable[[int], str] | None) -> None:
        self.piece = piece
        self.texts: list[str] = []
        self._index: dict[int, int] = {}

    def index(self, token: int) -> int:
        """The token's place in `texts`."""
        if token not in self._index:
            self._index[token] = len(self.texts)
            self.texts.append(self.piece(token) if self.piece else f"[{token}]")
        return self._index[token]


class _Payload:
    """What the browser of examples reads: `tasks`, and the traces in blocks."""

    def __init__(self, folder: Path, table: pd.DataFrame, pieces: _Vocabulary) -> None:
        self.pieces = pieces
        self.systems = [s for s in tables.SYSTEMS if s in table]
        self.blocks: list[str] = []
        self.moves: dict[str, list[analysis.Moves]] = {}
        self.tasks = []
        for row in headlines(table):
            if (folder / str(row["task"]) / "examples.jsonl").is_file():
                self.tasks.append(self._task(folder / str(row["task"]), row))

    @property
    def traced(self) -> bool:
        """Whether any completion has a trace."""
        return bool(self.blocks)

    def scripts(self) -> str:
        """The data as script elements that no browser runs."""
        systems = list(self.systems)
        data = {"systems": systems, "pieces": self.pieces.texts, "tasks": self.tasks}
        scripts = [_script("examples-data", _pack(data))]
        scripts += [_script(f"traces-{i}", block) for i, block in enumerate(self.blocks)]
        return "\n".join(scripts)

    def _task(self, folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        for example in _lines(folder / "examples.jsonl"):
            target = example.get("target")
            found[example["id"]] = {
                "id": example["id"],
                "prompt": example["prompt"]["raw"],
                "target": "" if target is None else _short(target),
                "texts": {},
                "right": {},
                "answers": {},
                "unparsed": [],
            }
        block: list[Any] = []
        moves: list[analysis.Moves] = []
        for system in self.systems:
            for completion in read_jsonl(folder / system / "completions.jsonl", Completion):
                example = found.get(completion.example_id)
                if example is None or completion.sample:
                    continue  # of several samples the first is shown
                example["texts"][system] = completion.text
                trace = completion.extra.get("trace")
                if system == "proxy" and trace:
                    # packed at once: the traces of a long run do not fit into memory together
                    if len(block) == _BLOCK:
                        self.blocks.append(_pack(block))
                        block = []
                    example["block"], example["slot"] = len(self.blocks), len(block)
                    block.append(self._trace(trace))
                    moves.append(analysis.moves(trace))
            for score in read_jsonl(folder / system / "scores.jsonl", Score):
                if score.example_id in found:
                    _add_score(found[score.example_id], system, score, row)
        if block:
            self.blocks.append(_pack(block))
        if moves:
            self.moves[folder.name] = moves
        harmful = not row["higher_is_better"]
        return {
            "name": folder.name,
            "good": "not " + str(row["label"]) if harmful else "right",
            "bad": str(row["label"]) if harmful else "wrong",
            "examples": list(found.values()),
        }

    def _trace(self, trace: analysis.Trace) -> list[Any]:
        """[token texts, p proxy, p base, {role: tops}] as indices and thousandths."""
        index = self.pieces.index
        roles = [r for r in MEMBERS if trace[0]["top"].get(r)]
        tops = {
            role: [
                [n for t, p in e["top"].get(role, [])[:_TOP] for n in (index(t), round(1000 * p))]
                for e in trace
            ]
            for role in roles
        }
        proxy = [round(1000 * e["p"][analysis.SYSTEM]) for e in trace]
        base = [round(1000 * e["p"].get("base", 0)) for e in trace]
        return [[index(e["id"]) for e in trace], proxy, base, tops]


def _add_score(example: dict[str, Any], system: str, score: Score, row: Mapping[str, Any]) -> None:
    value = score.values.get(row["metric"])
    if value is not None:
        good = value >= 0.5
        example["right"][system] = int(good if row["higher_is_better"] else not good)
    if score.answer:
        example["answers"][system] = _short(score.answer)
    if not score.parsed:
        example["unparsed"].append(system)


def _short(value: Any, limit: int = 400) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "…"


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="surrogatepass") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def _pack(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    # no time stamp: the same results give the same page
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _script(name: str, packed: str) -> str:
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def _lazy_pieces(folder: Path) -> Callable[[int], str] | None:
    """Token texts, from a tokenizer that is loaded when the first trace asks for one."""
    loaded: list[Callable[[int], str] | None] = []

    def piece(token: int) -> str:
        if not loaded:
            loaded.append(analysis.load_pieces(folder))
        return loaded[0](token) if loaded[0] else f"[{token}]"

    return piece


# -- sections --------------------


def _subtitle(run: Mapping[str, Any]) -> str:
    config = run.get("config", {})
    ids = {r: str((m or {}).get("id") or "") for r, m in (config.get("triple") or {}).items()}
    members = [f"{role}: {_place(i, config)}" for role, i in ids.items() if i]
    alpha = [f"alpha: {config['alpha']:g}"] if "alpha" in config else []
    return " · ".join([*members, *alpha])


def _place(model: str, config: Mapping[str, Any]) -> str:
    """A hub id, or a local folder without the part that says nothing to whom the page is sent."""
    path, root = Path(model), Path(str(config.get("root")))
    if not path.is_absolute():
        return model
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _differences(table: pd.DataFrame) -> str:
    rows = tables.difference_rows(table)
    if not rows:
        return ""
    head = ["task", "metric", "proxy minus", "difference", "95 % interval", "p"]
    return _details("Paired differences on the same examples", _html_table(head, rows, 3))


def _gaps(table: pd.DataFrame) -> str:
    rows = [r for r in headlines(table) if _known(r.get("gap_closed"))]
    if not rows:
        return ""
    return (
        '<section aria-labelledby="h-gaps"><h2 id="h-gaps">Gap closed</h2>'
        f'<div class="wide">{gap_svg(rows)}</div>'
        '<p class="soft">Bars: (proxy − base) / (tuned − base), in percent; whiskers: 95 % '
        "intervals, cut at the edges; dashed: the directly tuned model; diamonds: the paper.</p>"
        "</section>"
    )


def gap_svg(rows: list[dict[str, Any]]) -> str:
    """Horizontal bars of the gaps closed (rows of a comparison), as inline SVG.

    Each bar lies below its name, so that the letters keep their size on a phone.
    """
    left, width, height = 8, 344, 46
    ends = [r[k] for r in rows for k in ("gap_closed", "paper_gap_closed") if _known(r.get(k))]
    ends += [r["gap_closed_high"] for r in rows if _known(r.get("gap_closed_high"))]
    low, high = min(0.0, *ends), min(max(110.0, *ends), 200.0)
    low = max(low, -100.0)

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + width * share, 1)

    bottom = height * len(rows) + 2
    parts = [
        f'<svg viewBox="0 0 {width + 2 * left} {bottom + 20}" class="gaps" role="img" '
        'aria-label="Gap closed per task in percent">'
    ]
    for i, row in enumerate(rows):
        top = height * i
        middle = top + 31
        start, end = sorted((x(0), x(row["gap_closed"])))
        name = html.escape(str(row["task"]))
        parts.append(f'<text x="{left}" y="{top + 15}">{name}</text>')
        parts.append(
            f'<text class="value" x="{left + width}" y="{top + 15}" text-anchor="end">'
            f"{row['gap_closed']:.1f}</text>"
        )
        parts.append(
            f'<rect x="{start}" y="{top + 22}" width="{end - start:.1f}" height="18" '
            'fill="#1f5fa8"/>'
        )
        if _known(row.get("gap_closed_low")):
            a, b = x(row["gap_closed_low"]), x(row["gap_closed_high"])
            # light below dark: to be seen on the bar and beside it
            for colour, stroke in (("#fff", 4), ("#1b1b1b", 1.5)):
                parts.append(
                    f'<path d="M{a} {middle}H{b}M{a} {middle - 5}V{middle + 5}M{b} {middle - 5}'
                    f'V{middle + 5}" stroke="{colour}" stroke-width="{stroke}" fill="none"/>'
                )
        if _known(row.get("paper_gap_closed")):
            d = x(row["paper_gap_closed"])
            parts.append(
                f'<path d="M{d} {middle - 6}l6 6l-6 6l-6 -6z" fill="#fff" stroke="#1b1b1b"/>'
            )
        parts.append(
            f'<path d="M{x(0)} {top + 19}V{top + 43}" stroke="#1b1b1b"/>'
            f'<path d="M{x(100)} {top + 19}V{top + 43}" stroke="#1b1b1b" stroke-dasharray="4 3"/>'
        )
    for tick in (0, 50, 100):
        anchor = "start" if x(tick) == left else "middle"
        parts.append(f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="{anchor}">{tick}</text>')
    return "".join(parts) + "</svg>"


def _analyses(payload: _Payload, pieces: _Vocabulary) -> str:
    """The token analyses of the run's traces: a figure of changed tokens, and two tables."""
    moves = payload.moves
    if not moves:
        return ""
    from proxytune.results import figures

    shares = {t: analysis.changed_by_position(f, _FIGURE_POSITIONS) for t, f in moves.items()}
    figure = figures.changed_by_position(shares)
    overall = [[t, f"{100 * analysis.changed_share(f):.1f}"] for t, f in moves.items()]
    parts = [
        '<section aria-labelledby="h-tokens"><h2 id="h-tokens">What proxy-tuning changed</h2>',
        '<div class="figures">',
        f'<figure><img alt="Share of tokens changed by position" src="{_png(figure)}">'
        '<figcaption class="soft">Share of tokens that the base alone would have written '
        "differently, by position.</figcaption></figure>",
        f'<div class="wide">{_html_table(["task", "tokens changed, %"], overall, 1)}</div></div>',
    ]
    if pieces.piece is not None:
        for task, found in moves.items():
            parts.append(_token_tables(task, found, pieces.piece))
    return "".join(parts) + "</section>"


def _token_tables(task: str, texts: list[analysis.Moves], piece: Callable[[int], str]) -> str:
    least = 100 if sum(len(text.ids) for text in texts) > 20_000 else 10
    rows = [
        [p.token, f"{p.mean_delta:+.3f}", str(p.count), p.ngram]
        for p in analysis.most_promoted(texts, piece, min_count=least)
    ]
    parts = []
    if rows:
        head = ["token", "mean rise", "count", "commonest four tokens around it"]
        parts.append(f'<p class="soft">Types chosen at least {least} times.</p>')
        parts.append(_html_table(head, rows, 1, until=3))
    sides = analysis.compare_sides(texts, piece)
    if min(sides.left_tokens, sides.right_tokens) >= _FEW_SIDES:
        p = "" if math.isnan(sides.p_value) else f"; Welch’s test: p {_p(sides.p_value)}"
        parts.append(
            f"<p>Equations: mean rise {sides.left_mean:.3f} on left-hand sides "
            f"({sides.left_tokens:,} tokens), {sides.right_mean:.3f} on right-hand sides "
            f"({sides.right_tokens:,} tokens){p}.</p>"
        )
    title = f"{html.escape(task)}: the tokens raised most"
    return _details(title, "".join(parts)) if parts else ""


def _provenance(run: Mapping[str, Any]) -> str:
    sessions = run.get("sessions") or [{}]
    last = sessions[-1]
    hardware = last.get("hardware") or {}
    git = last.get("git") or {}
    dirty = " (with uncommitted changes)" if git.get("dirty") else ""
    models = (run.get("models") or {}).items()
    rows = [
        ["command", " ".join(last.get("command", []))],
        ["started", str(last.get("started", ""))],
        ["seconds", str(last.get("seconds", ""))],
        ["git commit", f"{git.get('commit')}{dirty}"],
        ["configuration, SHA-256", str(run.get("config_sha256", ""))],
        ["machine", f"{hardware.get('platform', '')}, {hardware.get('cores', '?')} cores"],
        ["GPUs", ", ".join(hardware.get("gpus") or []) or "none"],
        *([f"model: {role}", _model(model)] for role, model in models),
        *([f"dataset: {t}, SHA-256", str(h)] for t, h in (run.get("datasets") or {}).items()),
        *([f"version: {n}", str(v)] for n, v in (last.get("versions") or {}).items()),
    ]
    whole = html.escape(json.dumps(run, indent=2, ensure_ascii=False))
    return f'<div class="wide">{_html_table(["what", "value"], rows, 2)}</div>' + _details(
        "run.json in full", f"<pre>{whole}</pre>", printed=False
    )


def _model(model: Mapping[str, Any]) -> str:
    revision = f" at {model['revision']}" if model.get("revision") else ""
    weights = f", weights {str(model['weights'])[:12]}" if model.get("weights") else ""
    return f"{model.get('id')}{revision}, {model.get('dtype')}{weights}"


# -- pieces of HTML --------------------


def _html_table(head: list[str], rows: list[list[str]], num_from: int, until: int = 99) -> str:
    def cells(tag: str, values: list[str]) -> str:
        kinds = [' class="num"' if num_from <= i < until else "" for i in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{html.escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _details(summary: str, content: str, *, printed: bool = True) -> str:
    kind = ' class="printed"' if printed else ""
    return f'<details{kind}><summary>{summary}</summary><div class="wide">{content}</div></details>'


def _png(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png", metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
