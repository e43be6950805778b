"""One self-contained HTML page per experiment: the table, figures, and every example.

The page loads nothing from elsewhere. It holds the texts as gzip in base64, and the traces in
blocks of a few examples each. Its script draws only the examples on view, so a page of a thousand
examples opens as fast as one of ten.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from proxytune.errors import UserError
from proxytune.files import check_plain_files, read_jsonl, replace_file
from proxytune.records import Completion, Example, Score
from proxytune.results import analysis, tables
from proxytune.results.comparison import caveat, headlines, is_number, systems_of
from proxytune.results.folder import read_csv
from proxytune.results.packed import pack, short
from proxytune.results.run_json import read_run_json
from proxytune.results.templates import asset, render

# the page's script unpacks the traces of this many examples at once
_BLOCK = 20
# how many candidates of each member a reader sees per token
_TOP = 3
_FIGURE_POSITIONS = 64
# fewer tokens than this on a side of equations are too few for a test
_FEW_SIDES = 30
# in texts of more tokens than this, enough token types occur 100 times
_MANY_TOKENS = 20_000


def write_report(folder: Path) -> Path:
    """Writes <folder>/report.html; see `page_of`.

    Returns:
        The page.
    """
    path = folder / "report.html"
    replace_file(path, page_of(folder).encode(errors="replace"))
    return path


def page_of(folder: Path) -> Markup:
    """The page of a run, from the files of its results folder.

    Args:
        folder: holds run.json, table.csv, and per task examples, completions and scores.

    Raises:
        UserError: the folder has no table yet, a damaged file, or a symbolic link.
    """
    check_plain_files(folder)
    if not (folder / "table.csv").is_file():
        raise UserError(f"{folder} has no table.csv; score the run first (stage=score)")
    table = read_csv(folder / "table.csv")
    run = read_run_json(folder)
    pieces = _Vocabulary(_lazy_pieces(folder))
    examples = _Examples(folder, table, pieces)
    return render(
        "report.html",
        title=str(run.get("name", folder.name)),
        subtitle=_subtitle(run),
        css=asset("page.css"),
        js=asset("page.js") + asset("report.js"),
        caveat=caveat(table),
        comparison=tables.to_html(table),
        reading_aid=tables.reading_aid(table),
        sources=tables.printed_sources(table),
        unparsed=tables.unparsed_text(table),
        differences=tables.difference_rows(table),
        gaps=_gaps(table),
        changes=_changes(examples.moves, pieces.piece),
        provenance=_provenance(run),
        run_json=json.dumps(run, indent=2, ensure_ascii=False),
        examples=examples.packed(),
        traces=examples.blocks,
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


class _Examples:
    """The data of the page's browser of examples.

    Attributes:
        systems: the columns of the browser.
        tasks: per task its name, its words for right and wrong, and its examples.
        blocks: the traces, packed, `_BLOCK` examples in each.
        moves: task -> the traces, reduced for the analyses.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, pieces: _Vocabulary) -> None:
        self.systems = systems_of(table)
        self.blocks: list[str] = []
        self.moves: dict[str, list[analysis.Moves]] = {}
        self._pieces = pieces
        self.tasks = []
        for row in headlines(table):
            if (folder / str(row["task"]) / "examples.jsonl").is_file():
                self.tasks.append(self._task(folder / str(row["task"]), row))

    def packed(self) -> str:
        """All of the data except the traces, packed."""
        texts = self._pieces.texts
        return pack({"systems": self.systems, "pieces": texts, "tasks": self.tasks})

    def _task(self, folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        found = {e.id: _example(e) for e in read_jsonl(folder / "examples.jsonl", Example)}
        for system in self.systems:
            for score in read_jsonl(folder / system / "scores.jsonl", Score):
                if score.example_id in found:
                    _add_score(found[score.example_id], system, score, row)
            self._add_completions(found, folder / system)
        harmful = not row["higher_is_better"]
        return {
            "name": folder.name,
            "good": "not " + str(row["label"]) if harmful else "right",
            "bad": str(row["label"]) if harmful else "wrong",
            "examples": list(found.values()),
        }

    def _add_completions(self, examples: dict[str, dict[str, Any]], folder: Path) -> None:
        """Adds one system's texts to the examples, and the proxy's traces to the blocks."""
        block: list[Any] = []
        moves: list[analysis.Moves] = []
        path = folder / "completions.jsonl"
        for completion in read_jsonl(path, Completion):
            example = examples.get(completion.example_id)
            if example is None or completion.sample:
                continue  # the browser shows the first of several samples
            example["texts"][folder.name] = completion.text
            trace = analysis.trace_of(completion, path) if folder.name == "proxy" else None
            if trace:
                # pack each full block at once: memory cannot hold all traces of a long run
                if len(block) == _BLOCK:
                    self.blocks.append(pack(block))
                    block = []
                example["block"], example["slot"] = len(self.blocks), len(block)
                block.append(self._trace(trace))
                moves.append(analysis.moves(trace))
        if block:
            self.blocks.append(pack(block))
        if moves:
            self.moves[folder.parent.name] = moves

    def _trace(self, trace: analysis.Trace) -> list[Any]:
        """A trace as the page's script reads it.

        Returns:
            [token texts, p of the proxy, p of the base, {role: per token its candidates}]. Texts
            are indices into the vocabulary, probabilities are thousandths; candidates are a flat
            list of text, probability, text, probability, ...
        """
        index = self._pieces.index
        first = trace[0]["top"]
        roles = [role for role in first if role != analysis.SYSTEM and first[role]]
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


def _example(example: Example) -> dict[str, Any]:
    """An example as the page's script reads it; completions and scores come later."""
    return {
        "id": example.id,
        "prompt": example.prompt.raw,
        "target": "" if example.target is None else short(example.target),
        "texts": {},
        "right": {},
        "answers": {},
        "unparsed": [],
    }


def _add_score(example: dict[str, Any], system: str, score: Score, row: Mapping[str, Any]) -> None:
    value = score.values.get(row["metric"])
    if value is not None:
        good = value >= 0.5
        example["right"][system] = int(good if row["higher_is_better"] else not good)
    if score.answer:
        example["answers"][system] = short(score.answer)
    if not score.parsed:
        example["unparsed"].append(system)


def _lazy_pieces(folder: Path) -> Callable[[int], str] | None:
    """A function from token id to text that loads the tokenizer at its first call."""
    loaded: list[Callable[[int], str] | None] = []

    def piece(token: int) -> str:
        if not loaded:
            loaded.append(analysis.load_pieces(folder))
        return loaded[0](token) if loaded[0] else f"[{token}]"

    return piece


# -- sections --------------------


def _subtitle(run: Mapping[str, Any]) -> str:
    config = run.get("config", {})
    triple = {r: m for r, m in (config.get("triple") or {}).items() if isinstance(m, dict)}
    for name, pair in triple.pop("pairs", {}).items():
        pair = pair if isinstance(pair, dict) else {}
        triple |= {f"{name} {r}": m for r, m in pair.items() if isinstance(m, dict)}
    ids = {role: str(member.get("id") or "") for role, member in triple.items()}
    members = [f"{role}: {_place(i, config)}" for role, i in ids.items() if i]
    alpha = [f"alpha: {config['alpha']:g}"] if "alpha" in config else []
    return " · ".join([*members, *alpha])


def _place(model: str, config: Mapping[str, Any]) -> str:
    """A hub id as it is; a local folder without the part that means nothing on other machines."""
    path, root = Path(model), Path(str(config.get("root")))
    if not path.is_absolute():
        return model
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _gaps(table: pd.DataFrame) -> Markup | None:
    """The bars of the gap closed; None where no task has a gap."""
    if not any(is_number(row.get("gap_closed")) for row in headlines(table)):
        return None
    from proxytune.results import figures

    return Markup(figures.svg(figures.gap_bars(table)))


def _changes(
    moves: Mapping[str, list[analysis.Moves]], piece: Callable[[int], str] | None
) -> dict[str, Any] | None:
    """The changed tokens of the traces: a figure, a share per task, and tables of tokens."""
    if not moves:
        return None
    from proxytune.results import figures

    by_position = {t: analysis.changed_by_position(m, _FIGURE_POSITIONS) for t, m in moves.items()}
    tokens = [_tokens(task, texts, piece) for task, texts in moves.items()] if piece else []
    return {
        "figure": Markup(figures.svg(figures.changed_by_position(by_position))),
        "shares": [[t, f"{100 * analysis.changed_share(m):.1f}"] for t, m in moves.items()],
        "tasks": [task for task in tokens if task["promoted"] or task["equations"]],
    }


def _tokens(task: str, texts: list[analysis.Moves], piece: Callable[[int], str]) -> dict[str, Any]:
    """A task's most promoted tokens, and its equations where it has enough of them."""
    least = 100 if sum(len(text.ids) for text in texts) > _MANY_TOKENS else 10
    sides = analysis.compare_sides(texts, piece)
    equations = ""
    if min(sides.left_tokens, sides.right_tokens) >= _FEW_SIDES:
        p = tables.p_text(sides.p_value, equals="= ")
        test = "" if math.isnan(sides.p_value) else f"; Welch’s test: p {p}"
        equations = (
            f"Equations: mean rise {sides.left_mean:.3f} on left-hand sides "
            f"({sides.left_tokens:,} tokens), {sides.right_mean:.3f} on right-hand sides "
            f"({sides.right_tokens:,} tokens){test}."
        )
    return {
        "name": task,
        "least": least,
        "promoted": [
            [p.token, f"{p.mean_delta:+.3f}", str(p.count), p.ngram]
            for p in analysis.most_promoted(texts, piece, min_count=least)
        ],
        "equations": equations,
    }


def _provenance(run: Mapping[str, Any]) -> list[list[str]]:
    """The facts of run.json that a reader asks for first, as rows of a table."""
    sessions = run.get("sessions") or [{}]
    last = sessions[-1]
    hardware = last.get("hardware") or {}
    git = last.get("git") or {}
    dirty = " (with uncommitted changes)" if git.get("dirty") else ""
    models = (run.get("models") or {}).items()
    return [
        ["command", " ".join(last.get("command", []))],
        ["started", str(last.get("started", ""))],
        ["seconds", str(last.get("seconds", ""))],
        ["git commit", f"{git.get('commit')}{dirty}"],
        ["configuration, SHA-256", str(run.get("config_sha256", ""))],
        ["machine", f"{hardware.get('platform', '')}, {hardware.get('cores', '?')} cores"],
        ["GPUs", ", ".join(hardware.get("gpus") or []) or "none"],
        *([f"replica {n}", _replica(each)] for n, each in enumerate(last.get("replicas") or [], 1)),
        *([f"model: {role}", _model(model)] for role, model in models),
        *([f"dataset: {t}, SHA-256", str(h)] for t, h in (run.get("datasets") or {}).items()),
        *([f"dataset: {t}", str(o)] for t, o in (run.get("other_datasets") or {}).items()),
        *([f"version: {n}", str(v)] for n, v in (last.get("versions") or {}).items()),
    ]


def _replica(ran: Mapping[str, Any]) -> str:
    """Where a replica ran, and what it did; as `experiment.replicas.Ran.to_dict` writes it."""
    work = f"{ran.get('prompts')} prompts, {ran.get('tokens')} tokens, {ran.get('seconds')} s"
    return f"{'; then '.join(ran.get('places') or [])}: {work}"


def _model(model: Mapping[str, Any]) -> str:
    revision = f" at {model['revision']}" if model.get("revision") else ""
    weights = f", weights {str(model['weights'])[:12]}" if model.get("weights") else ""
    return f"{model.get('id')}{revision}, {model.get('dtype')}{weights}"
