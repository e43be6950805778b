"""What proxy-tuning changed, token by token: the paper's sections 6.1, 6.2 and C.2.

The analyses read stored traces and metrics and need no model. A trace is the list that
`decoding=traced` stores in `Completion.extra["trace"]`, one entry per generated token:
{"id": token, "p": {role: probability}, "top": {role: [[token, probability], ...]}}, where the role
"system" is the triple.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from proxytune.engine.text import TokenTexts
from proxytune.errors import UserError
from proxytune.files import read_jsonl
from proxytune.records import Completion, Metric
from proxytune.results.run_json import read_run_json

Trace = list[dict[str, Any]]

_OPERAND = re.compile(r"[0-9,$€+\-×*/]+")
SYSTEM = "system"


@dataclass(frozen=True)
class EquationTest:
    """Mean probability rise on both sides of equations, and Welch's test of their difference.

    Attributes:
        left_mean, right_mean: mean of p_proxy - p_base over the tokens of a side.
        left_tokens, right_tokens: how many tokens a side has.
        t, p_value: Welch's test; not-a-number with fewer than two tokens on a side.
    """

    left_mean: float
    right_mean: float
    left_tokens: int
    right_tokens: int
    t: float
    p_value: float


@dataclass(frozen=True)
class Promoted:
    """A token type whose probability proxy-tuning raised.

    Attributes:
        token: its text.
        mean_delta: mean of p_proxy - p_base where it was chosen.
        count: how often it was chosen.
        ngram: the most frequent four tokens in a row that contain it, as text.
        ngram_count: how often these four tokens occur.
    """

    token: str
    mean_delta: float
    count: int
    ngram: str
    ngram_count: int


def trace_of(completion: Completion, path: Path) -> Trace | None:
    """The trace of a completion; None of one that was not traced.

    Args:
        completion: of the proxy.
        path: its file, for the message.

    Raises:
        UserError: it is damaged.
    """
    trace = completion.extra.get("trace")
    if not trace:
        return None
    if not isinstance(trace, list) or not all(map(_is_entry, trace)):
        where = f"example {completion.example_id!r}, sample {completion.sample}"
        raise UserError(f"{path}: the trace of {where} is damaged; restore the file")
    return trace


def _is_entry(entry: Any) -> bool:
    """Whether a value is one token of a trace."""
    if not isinstance(entry, dict) or not _is_token(entry.get("id")):
        return False
    p, top = entry.get("p"), entry.get("top")
    if not isinstance(p, dict) or not isinstance(top, dict) or not top.get("base"):
        return False
    return (
        {SYSTEM, "base"} <= p.keys()
        and all(map(_is_probability, p.values()))
        and all(isinstance(listed, list) for listed in top.values())
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and _is_token(pair[0])
            and _is_probability(pair[1])
            for listed in top.values()
            for pair in listed
        )
    )


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1.001  # rounded sums exceed 1


def read_traces(folder: Path, sample: int | None = None) -> Iterator[tuple[str, Trace]]:
    """Yields the example id and the trace of every traced completion in a folder.

    Args:
        folder: <results>/<task>/proxy.
        sample: only this sample of each example; None for all.
    """
    path = folder / "completions.jsonl"
    for completion in read_jsonl(path, Completion):
        trace = trace_of(completion, path)
        if trace and (sample is None or completion.sample == sample):
            yield completion.example_id, trace


@dataclass(frozen=True)
class Moves:
    """The part of a trace that the analyses need, in a few bytes per token.

    Attributes:
        ids: the chosen tokens, [tokens].
        rises: p_proxy - p_base, how far proxy-tuning raised each token (section 6.1), [tokens].
        changed: whether the base, reading the same text, would greedily have written another
            token (appendix C.2), [tokens].
    """

    ids: NDArray[np.int32]
    rises: NDArray[np.float64]
    changed: NDArray[np.bool_]


def moves(trace: Trace) -> Moves:
    """Reduces a trace."""
    return Moves(
        np.array([e["id"] for e in trace], dtype=np.int32),
        np.array([e["p"][SYSTEM] - e["p"]["base"] for e in trace], dtype=np.float64),
        np.array([e["top"]["base"][0][0] != e["id"] for e in trace], dtype=np.bool_),
    )


def read_moves(folder: Path) -> list[Moves]:
    """The moves of the first sample of every traced example in a folder.

    Args:
        folder: <results>/<task>/proxy.
    """
    return [moves(trace) for _, trace in read_traces(folder, sample=0)]


# -- section 6.1: equations --------------------


def equation_sides(tokens: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The equations among tokens: positions of the left-hand and of the right-hand sides.

    An equation is a maximal run of operand tokens on either side of a token "=": tokens of digits
    and of the signs `, $ € + - × * /`. Spaces around a token do not matter, and a token of spaces
    alone (Llama-2 writes " 5" as two) neither ends a run nor counts; a line break ends it. In a
    chain a = b = c, b and c are right-hand sides. A run without a digit is no side.

    Args:
        tokens: the text of each token.
    """
    found = []
    run: list[int] = []  # operands since the run's start
    left: list[int] | None = None  # the left-hand side, once "=" has come
    for position, token in enumerate([*tokens, "\n"]):
        word = token.strip(" \u2581")
        if word == "=" and (left is not None or _has_digit(tokens, run)):
            left, run = (run, []) if left is None else (left, run)
        elif _OPERAND.fullmatch(word):
            run.append(position)
        elif word:
            if left is not None and _has_digit(tokens, run):
                found.append((left, run))
            run, left = [], None
    return found


def _has_digit(tokens: Sequence[str], positions: Iterable[int]) -> bool:
    return any(character.isdigit() for i in positions for character in tokens[i])


def compare_sides(texts: Iterable[Moves], piece: Callable[[int], str]) -> EquationTest:
    """Whether proxy-tuning moves left-hand sides more than right-hand sides (section 6.1).

    Args:
        texts: completions with equations in them.
        piece: token id -> its text.
    """
    left: list[float] = []
    right: list[float] = []
    for text in texts:
        for left_side, right_side in equation_sides([piece(i) for i in text.ids.tolist()]):
            left += text.rises[left_side].tolist()
            right += text.rises[right_side].tolist()
    t = p = float("nan")
    if min(len(left), len(right)) > 1:
        test: Any = scipy_stats.ttest_ind(left, right, equal_var=False)
        t, p = float(test.statistic), float(test.pvalue)
    means = [float(np.mean(side)) if side else float("nan") for side in (left, right)]
    return EquationTest(means[0], means[1], len(left), len(right), t, p)


# -- section 6.1: tokens --------------------


def most_promoted(
    texts: Sequence[Moves], piece: Callable[[int], str], min_count: int = 100, top: int = 10
) -> list[Promoted]:
    """The token types with the largest mean rise, and the commonest 4-gram of each (Table 6).

    Args:
        texts: the proxy's completions.
        piece: token id -> its text.
        min_count: how often a type must have been chosen to count.
        top: how many types to return.
    """
    rises: dict[int, list[float]] = defaultdict(list)
    for text in texts:
        for token, rise in zip(text.ids.tolist(), text.rises.tolist(), strict=True):
            rises[token].append(rise)
    means = {t: float(np.mean(r)) for t, r in rises.items() if len(r) >= min_count}
    # Ties go by token ids, because completions stand in the order in which they ended.
    best = sorted(means, key=lambda token: (-means[token], token))[:top]
    ngrams: dict[int, Counter[tuple[int, ...]]] = {token: Counter() for token in best}
    for text in texts:
        ids = text.ids.tolist()
        for start in range(len(ids) - 3):
            window = tuple(ids[start : start + 4])
            for token in set(window) & ngrams.keys():
                ngrams[token][window] += 1
    found = []
    for token in best:
        counts = ngrams[token] or {(token,): 0}
        window, count = min(counts.items(), key=lambda each: (-each[1], each[0]))
        ngram = _visible("".join(piece(t) for t in window))
        name = _visible(piece(token))
        found.append(Promoted(name, means[token], len(rises[token]), ngram, count))
    return found


def _visible(text: str) -> str:
    """A text for a table's cell: line breaks become ↵, and a text of spaces becomes ␣."""
    return text.replace("\n", "↵").strip() or "␣"


# -- appendix C.2: changed tokens --------------------


def changed_share(texts: Iterable[Moves]) -> float:
    """The share of all tokens that proxy-tuning changed; not-a-number without tokens."""
    flags = [text.changed for text in texts]
    return float(np.concatenate(flags).mean()) if flags else float("nan")


def changed_by_position(texts: Iterable[Moves], positions: int = 64) -> pd.DataFrame:
    """The share of tokens changed at each position (Figure 3).

    Returns:
        Columns position (from 1), tokens (how many completions are that long), share.
    """
    counts = np.zeros((2, positions), dtype=np.int64)
    for text in texts:
        flags = text.changed[:positions]
        counts[0, : len(flags)] += 1
        counts[1, : len(flags)] += flags
    reached = counts[0] > 0
    return pd.DataFrame(
        {
            "position": np.arange(1, positions + 1)[reached],
            "tokens": counts[0][reached],
            "share": counts[1][reached] / counts[0][reached],
        }
    )


# -- section 6.2: alpha --------------------


def alpha_sweep(folders: Iterable[Path], task: str | None = None) -> pd.DataFrame:
    """The proxy's metrics of runs that differ in alpha (Figure 2).

    Args:
        folders: results folders; those without run.json or metrics.jsonl are skipped.
        task: only this task; None for all.

    Returns:
        Columns experiment, alpha, task, metric, value, low, high, n; sorted by task, metric, alpha.
    """
    rows = []
    for folder in folders:
        run, metrics = folder / "run.json", folder / "metrics.jsonl"
        if not (run.is_file() and metrics.is_file()):
            continue
        config = read_run_json(folder)["config"]
        if "alpha" not in config:
            raise UserError(f"{run} says of no alpha; restore it, or move the folder away")
        for m in read_jsonl(metrics, Metric):
            if m.system == "proxy" and task in (None, m.task):
                rows.append(
                    {
                        "experiment": config.get("name", folder.name),
                        "alpha": float(config["alpha"]),
                        "task": m.task,
                        "metric": m.metric,
                        "value": m.value,
                        "low": m.ci_low,
                        "high": m.ci_high,
                        "n": m.n,
                    }
                )
    columns = ["experiment", "alpha", "task", "metric", "value", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["task", "metric", "alpha"], ignore_index=True)


# -- token texts --------------------


def load_pieces(folder: Path) -> Callable[[int], str] | None:
    """A function from token id to text for a results folder's models.

    A folder may be a stranger's, so the tokenizer is one that this machine has already, and brings
    no code of its own.

    Returns:
        The function; None where no member's tokenizer can be loaded.
    """
    from transformers import AutoTokenizer

    triple = read_run_json(folder)["config"].get("triple", {})
    for role in ("base", "antiexpert", "expert"):
        member = triple.get(role)
        if not isinstance(member, dict) or not isinstance(member.get("id"), str):
            continue
        if member.get("api"):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                member["id"],
                revision=member.get("revision"),
                local_files_only=True,
                trust_remote_code=False,
            )
            return TokenTexts(tokenizer).text
        except (OSError, ValueError, KeyError):
            continue  # not downloaded here; another member has the same vocabulary
    return None
