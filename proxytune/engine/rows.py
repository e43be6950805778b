"""The rows of the decode loop: one sample each, from its request to its record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from proxytune.engine.sampling import NOTHING, Sampler, sample_stream
from proxytune.engine.system import Pass, Prompt
from proxytune.engine.text import GrowingText
from proxytune.engine.truncation import TruncationRecord
from proxytune.records import Decoding, FinishReason


@dataclass(frozen=True)
class Request:
    """One prompt, to be continued `decoding.n` times.

    Attributes:
        index: the caller's number for it.
        prompt: role -> token ids.
        context: the token ids after which the text is decoded (the base's prompt).
        key: names the prompt in the random streams of its samples.
        seed: of the random streams.
        decoding: settings.
        sampler: the settings' sampler.
        eos_ids: tokens that end a completion.
        max_new_tokens: decoding.max_new_tokens, or less where the context ends before.
        tokenizer: decodes the text; None for none.
        record: how many top tokens per member `Finished.trace` lists; 0 for no trace.
        alpha: of this prompt alone, where the system is a triple; None is the system's own.
        on_token: called with every token as it is chosen, also the one that ends the completion:
            (sample, token, the text that became certain by it, the system's logits [vocab]).
    """

    index: int
    prompt: Prompt
    context: Sequence[int]
    key: str
    seed: int
    decoding: Decoding
    sampler: Sampler
    eos_ids: frozenset[int]
    max_new_tokens: int
    tokenizer: Any | None = None
    record: int = 0
    alpha: float | None = None
    on_token: Callable[[int, int, str, torch.Tensor], None] | None = None

    @cached_property
    def room(self) -> int:
        """Tokens that its longest member's row may come to."""
        return longest(self.prompt) + self.max_new_tokens


@dataclass(frozen=True)
class Finished:
    """One sample that has ended; the fields are those of `records.Completion`."""

    index: int
    sample: int
    text: str
    raw_text: str
    token_ids: list[int]
    finish_reason: FinishReason
    trace: list[dict[str, Any]] | None = None
    truncation: TruncationRecord | None = None


class Shared:
    """What the samples of one prompt share: who has started, and what the pass over it said."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = 0
        self.first: Pass | None = None  # after the prompt

    @property
    def left(self) -> int:
        """Samples that have not started."""
        return self.request.decoding.n - self.started


class Row:
    """One sample while it is written."""

    def __init__(self, shared: Shared) -> None:
        request = shared.request
        self.shared = shared
        self.request = request
        self.sample = shared.started
        shared.started += 1
        self.stream = sample_stream(request.seed, request.key, self.sample)
        self.tokens: list[int] = []
        self.fed = 0  # generated tokens that the system has read
        self.text = GrowingText(request.tokenizer, request.context, request.decoding.stop)
        self.trace: list[dict[str, Any]] | None = [] if request.record else None
        self.truncation: TruncationRecord | None = None
        self.reason: FinishReason | None = None

    def prompt(self) -> Prompt:
        """The prompt and what has been generated after it."""
        return {role: [*ids, *self.tokens] for role, ids in self.request.prompt.items()}

    def push(self, token: int) -> str:
        """Takes the next token; sets `reason` when it was the last. Returns the certain text."""
        request = self.request
        text = ""
        if token == NOTHING:
            self.reason = "nothing"
        elif token in request.eos_ids:
            self.reason = "eos"
        else:
            self.tokens.append(token)
            text = self.text.push(token)
            if len(self.tokens) >= request.max_new_tokens:
                self.reason = "length"
        if self.reason is not None:
            text += self.text.finish()
        if self.text.cut is not None:
            self.reason = "stop"
        return text

    def take(self, token: int, seen: Pass, place: int, certain: bool, unseen: float) -> None:
        """Takes the token that was chosen from one place of a (flat) pass.

        Args:
            token: the choice.
            seen: what it was chosen from, for the trace and for who watches.
            place: where in `seen`.
            certain: whether the whole answer of an API could not have led to another choice.
            unseen: the probability that the API did not list.
        """
        if self.trace is not None:
            each_role = {"system": seen.logits[place]}
            each_role |= {role: each[place] for role, each in seen.members.items()}
            self.trace.append(trace_of(each_role, token, self.request.record))
        if seen.truncation is not None:
            if self.truncation is None:
                self.truncation = TruncationRecord(seen.truncation.mode, seen.truncation.k)
            self.truncation.add(certain, unseen)
        text = self.push(token)
        if self.request.on_token is not None:
            self.request.on_token(self.sample, token, text, seen.logits[place])

    def finished(self) -> Finished:
        """The record of the ended sample."""
        assert self.reason is not None
        return Finished(
            self.request.index,
            self.sample,
            self.text.text,
            self.text.raw,
            self.tokens,
            self.reason,
            self.trace,
            self.truncation,
        )


@dataclass(slots=True)
class Chosen:
    """The tokens chosen at the places of a flat pass, and how sure each choice is."""

    seen: Pass
    tokens: list[int]
    certain: list[bool]
    unseen: list[float]

    def give(self, row: Row, first: int, count: int = 1) -> None:
        """Hands a row its tokens, those of `count` places from `first` on, until it ends."""
        for place in range(first, first + count):
            row.take(
                self.tokens[place],
                self.seen,
                place,
                self.certain[place] if self.certain else True,
                self.unseen[place] if self.unseen else 0.0,
            )
            if row.reason is not None:
                return


def choose_from(seen: Pass, rows: Sequence[Row], offsets: Sequence[int]) -> Chosen:
    """Chooses at every place of a flat pass; see `choose`."""
    picked = choose(seen.logits, rows, offsets)
    certain, unseen = [], []
    if seen.truncation is not None:
        certain = certain_choices(picked, seen.logits, seen.truncation.ceiling, rows, offsets)
        unseen = seen.truncation.unseen.tolist()
    return Chosen(seen, picked.tolist(), certain, unseen)


def choose(logits: torch.Tensor, rows: Sequence[Row], offsets: Sequence[int]) -> torch.Tensor:
    """Each row's next token, `offsets` positions after what it has; [rows]."""
    groups = by_sampler(rows, offsets)
    if len(groups) == 1:
        ((sampler, _, streams, positions),) = groups
        return sampler.choose(logits, streams, positions)
    chosen = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for sampler, indices, streams, positions in groups:
        where = torch.tensor(indices, device=logits.device)
        chosen[where] = sampler.choose(logits[where], streams, positions)
    return chosen


def certain_choices(
    chosen: torch.Tensor,
    logits: torch.Tensor,
    ceiling: torch.Tensor,
    rows: Sequence[Row],
    offsets: Sequence[int],
) -> list[bool]:
    """Whether each choice of `choose` holds whatever the unknown logits are."""
    certain = [True] * len(rows)
    for sampler, indices, streams, positions in by_sampler(rows, offsets):
        where = torch.tensor(indices, device=logits.device)
        sure = sampler.certain(
            chosen[where], logits[where], ceiling[where], streams, positions
        ).tolist()
        for index, each in zip(indices, sure, strict=True):
            certain[index] = each
    return certain


def by_sampler(
    rows: Sequence[Row], offsets: Sequence[int]
) -> list[tuple[Sampler, list[int], list[int], list[int]]]:
    """The rows that share a sampler: it, their indices, streams and positions."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.request.sampler), []).append(index)
    return [
        (
            rows[indices[0]].request.sampler,
            indices,
            [rows[i].stream for i in indices],
            [len(rows[i].tokens) + offsets[i] for i in indices],
        )
        for indices in groups.values()
    ]


def places(rows: Sequence[Row], width: int) -> tuple[list[Row], list[int]]:
    """The rows and offsets of the flattened places of a block [rows, width]."""
    return [row for row in rows for _ in range(width)], list(range(width)) * len(rows)


def longest(prompt: Prompt) -> int:
    """Tokens of a prompt, in the member that reads most."""
    return max(map(len, prompt.values()))


def trace_of(logits: Mapping[str, torch.Tensor], token: int, top: int) -> dict[str, Any]:
    """One generated token for `Finished.trace`.

    {"id": token, "p": {role: probability of the token}, "top": {role: [[id, probability], ...]}},
    probabilities before temperature and filters; the role "system" is what decodes (the triple).
    """
    probs = {role: each.float().softmax(-1) for role, each in logits.items()}
    tops = {role: each.topk(min(top, each.shape[-1])) for role, each in probs.items()}
    return {
        "id": token,
        "p": {role: round(float(each[token]), 6) for role, each in probs.items()},
        "top": {
            role: [[i, round(p, 6)] for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
            for role, best in tops.items()
        },
    }
