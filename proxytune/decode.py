"""The decode loop: which rows run, what each writes, and when it ends.

One loop serves every system: it drives a `Member` (a single model or a triple) and cannot tell
which. Rows leave the moment they end and waiting prompts take their place; the samples of one
prompt share its prefill.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from proxytune.memory import longest, out_of_memory
from proxytune.records import Decoding, FinishReason
from proxytune.sampling import Sampler, sample_stream
from proxytune.speculative import Pace
from proxytune.text import GrowingText

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One prompt, to be continued `decoding.n` times.

    Attributes:
        index: the caller's number for it.
        prompt: as the system's `prefill` takes it: token ids, or role -> token ids.
        context: the token ids behind which the text is decoded (the base's prompt).
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
    prompt: Any
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


class _Shared:
    """What the samples of one prompt share: who has started, and the first token's logits."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = 0
        self.first_logits: dict[str, torch.Tensor] | None = None

    @property
    def left(self) -> int:
        """Samples that have not started."""
        return self.request.decoding.n - self.started


class _Row:
    """One sample while it is written."""

    def __init__(self, shared: _Shared) -> None:
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
        self.reason: FinishReason | None = None

    def prompt(self) -> Any:
        """The prompt and what has been generated behind it, as `prefill` takes it."""
        prompt = self.request.prompt
        if isinstance(prompt, Mapping):
            return {role: [*ids, *self.tokens] for role, ids in prompt.items()}
        return [*prompt, *self.tokens]

    def push(self, token: int) -> str:
        """Takes the next token; sets `reason` when it was the last. Returns the certain text."""
        request = self.request
        text = ""
        if token in request.eos_ids:
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
        )


class DecodeLoop:
    """Continues many prompts with one system.

    Args:
        system: a `Member`; one that also has `draft` and `verify` can decode speculatively.
        max_rows: how many rows may run at once, given the longest of them in tokens.
        pace: decides the width of speculative blocks; None for lockstep.
    """

    def __init__(self, system: Any, max_rows: Callable[[int], int], pace: Pace | None) -> None:
        self.system = system
        self.pace = pace
        self.rows: list[_Row] = []
        self._max_rows = max_rows
        self._cap: int | None = None  # lowered when memory runs out
        self._tried = 0  # rows of the last pass
        self._waiting: deque[Request] = deque()
        self._joining: deque[_Row] = deque()  # rows that the system has still to read
        self._done: list[Finished] = []

    def run(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Yields every sample of every request as it ends; takes requests as they are needed."""
        source = iter(requests)
        exhausted = False
        try:
            while True:
                wanted = self._limit()
                while not exhausted and len(self._waiting) < wanted:
                    request = next(source, None)
                    exhausted = request is None
                    if request is not None:
                        self.add(request)
                if not self.busy:
                    return
                yield from self.step(more=not exhausted)
        finally:
            self.clear()

    def add(self, request: Request) -> None:
        """Lets a request wait for a free row."""
        self._waiting.append(request)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.rows or self._waiting or self._joining)

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """Drops the requests of this number, between two steps: their rows leave unfinished."""
        self._waiting = deque(each for each in self._waiting if each.index != index)
        self._joining = deque(row for row in self._joining if row.request.index != index)
        keep = [i for i, row in enumerate(self.rows) if row.request.index != index]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[i] for i in keep]
            self.system.keep(keep)

    def clear(self) -> None:
        """Drops everything that runs or waits, and the system's memory."""
        self.rows, self._done = [], []
        self._waiting.clear()
        self._joining.clear()
        self.system.clear()

    @torch.inference_mode()
    def step(self, more: bool = False) -> list[Finished]:
        """Admits what fits and advances every row by one block; returns what ended.

        Args:
            more: whether further requests are on their way; without them a few free rows are
                filled at once, with them they may wait for company (one prefill for several).
        """
        try:
            self._admit(more)
            if self.rows:
                self._advance()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._shrink(error)
        done, self._done = self._done, []
        return done

    # -- joining and leaving --------------------

    def _limit(self) -> int:
        rooms = [row.request.room for row in (*self.rows, *self._joining)]
        rooms += [request.room for request in self._waiting]
        limit = max(1, self._max_rows(max(rooms, default=1)))
        return min(limit, self._cap or limit)

    def _admit(self, more: bool) -> None:
        """Prefills waiting prompts into free rows and chooses their first tokens."""
        limit = self._limit()
        free = limit - len(self.rows)
        queue = len(self._joining) + len(self._waiting)
        if free <= 0 or not queue or (self.rows and more and free < limit // 8):
            return
        reserved = 0  # rows for further samples of the prompts that join: copies, not prefilled
        while self._waiting and len(self._joining) + reserved < free:
            shared = _Shared(self._waiting.popleft())
            self._joining.append(_Row(shared))
            reserved += min(shared.left, free - len(self._joining) - reserved)
        new = list(self._joining)[:free]
        self._tried = len(self.rows) + len(new)
        alphas = [row.request.alpha for row in new]
        own = {} if all(alpha is None for alpha in alphas) else {"alphas": alphas}
        logits = self.system.prefill([row.prompt() for row in new], **own)
        distributions = self._distributions(logits)
        sources, copies = [], []
        for index, row in enumerate(new):
            self._joining.popleft()
            row.fed = len(row.tokens)
            if row.shared.left and not row.tokens:
                row.shared.first_logits = {
                    r: each[index].clone() for r, each in distributions.items()
                }
            while row.shared.left and not row.tokens and len(new) + len(copies) < free:
                sources.append(len(self.rows) + index)
                copies.append(_Row(row.shared))
        present = len(self.rows) + len(new)
        self.rows += [*new, *copies]
        self._tried = len(self.rows)
        if copies:
            self.system.keep([*range(present), *sources])
        chosen = self._choose(logits, new, [0] * len(new)).tolist()
        self._push(new, chosen, logits, distributions)
        self._begin(copies)
        self._retire()

    def _begin(self, rows: list[_Row]) -> None:
        """Chooses the first token of rows whose prompt has been read for an earlier sample."""
        if not rows:
            return
        firsts = [row.shared.first_logits for row in rows]
        stacked = {role: torch.stack([f[role] for f in firsts if f]) for role in firsts[0] or {}}
        chosen = self._choose(stacked["system"], rows, [0] * len(rows)).tolist()
        self._push(rows, chosen, stacked["system"], stacked)

    def _retire(self) -> None:
        """Hands out the rows that have ended; further samples of their prompts take their place."""
        while any(row.reason for row in self.rows):
            counts = [0] * len(self.rows)
            keep = list(range(len(self.rows)))
            fresh: list[_Row] = []
            for index in reversed(range(len(self.rows))):
                row = self.rows[index]
                if row.reason is None:
                    continue
                self._done.append(row.finished())
                if row.shared.left:
                    counts[index] = row.fed
                    self.rows[index] = _Row(row.shared)
                    fresh.append(self.rows[index])
                    continue
                last, last_row = keep.pop(), self.rows.pop()
                if index < len(keep):
                    keep[index], self.rows[index] = last, last_row
            if any(counts):
                self.system.rollback(counts)
            if len(keep) < len(counts):
                self.system.keep(keep)
            self._begin(fresh)

    def _shrink(self, error: BaseException) -> None:
        """Memory has run out: all rows leave, and half as many at a time come back.

        They come back with what they have written as part of their prompt; their texts do not
        change.
        """
        if self._tried <= 1:
            raise error
        self._cap = self._tried // 2
        log.warning("out of memory at %d rows: going on with %d", self._tried, self._cap)
        for row in reversed(self.rows):
            self._joining.appendleft(row)
        self.rows = []
        self.system.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- one block of tokens --------------------

    def _advance(self) -> None:
        """Adds one block of tokens to every row: a single token, or what a draft got right."""
        rows = self.rows
        self._tried = len(rows)
        start = time.perf_counter()
        tokens = torch.tensor([row.tokens[-1] for row in rows])
        recording = any(row.trace is not None for row in rows)
        width = 1 if self.pace is None or recording else self.pace.width(len(rows))
        width = min(width, max(row.request.max_new_tokens - len(row.tokens) for row in rows))
        if width == 1:
            logits = self.system.step(tokens)
            chosen = self._choose(logits, rows, [0] * len(rows)).unsqueeze(1).tolist()
            drafted = [[]] * len(rows)
        else:

            def pick(logits: torch.Tensor, offset: int) -> torch.Tensor:
                return self._choose(logits, rows, [offset] * len(rows))

            block = self.system.draft(tokens, width, pick)
            logits = self.system.verify(block)
            repeated = [row for row in rows for _ in range(width)]
            offsets = list(range(width)) * len(rows)
            chosen = self._choose(logits.flatten(0, 1), repeated, offsets)
            chosen = chosen.view(len(rows), width).tolist()
            drafted = block[:, 1:].tolist()
        accepted = [_matching(*pair) for pair in zip(chosen, drafted, strict=True)]
        if self.pace is not None:
            seconds = time.perf_counter() - start
            self.pace.observe(len(rows), width, seconds, accepted)
        counts = []
        distributions = self._distributions(logits) if recording else {}
        for index, row in enumerate(rows):
            new = chosen[index][: accepted[index] + 1]
            row.fed += len(new)
            counts.append(width - len(new))
            for offset, token in enumerate(new):
                behind = (
                    logits[index : index + 1] if width == 1 else logits[index, offset : offset + 1]
                )
                self._push(
                    [row],
                    [token],
                    behind,
                    {r: d[index : index + 1] for r, d in distributions.items()},
                )
                if row.reason is not None:
                    break
        if any(counts):
            self.system.rollback(counts)
        self._retire()

    def _push(
        self,
        rows: list[_Row],
        tokens: list[int],
        logits: torch.Tensor,
        distributions: Mapping[str, torch.Tensor],
    ) -> None:
        """Gives each row its token, chosen from `logits` [rows, vocab]."""
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.trace is not None:
                each_role = {role: each[index] for role, each in distributions.items()}
                row.trace.append(_trace(each_role, token, row.request.record))
            text = row.push(token)
            if row.request.on_token is not None:
                row.request.on_token(row.sample, token, text, logits[index])

    def _choose(
        self, logits: torch.Tensor, rows: Sequence[_Row], offsets: Sequence[int]
    ) -> torch.Tensor:
        """Each row's next token, `offsets` positions behind what it has; [rows]."""
        positions = [len(row.tokens) + o for row, o in zip(rows, offsets, strict=True)]
        by_sampler: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_sampler.setdefault(id(row.request.sampler), []).append(index)
        if len(by_sampler) == 1:
            streams = [row.stream for row in rows]
            return rows[0].request.sampler.choose(logits, streams, positions)
        chosen = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for indices in by_sampler.values():
            where = torch.tensor(indices, device=logits.device)
            chosen[where] = rows[indices[0]].request.sampler.choose(
                logits[where], [rows[i].stream for i in indices], [positions[i] for i in indices]
            )
        return chosen

    def _distributions(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The system's logits and those of its members, by role."""
        return {"system": logits, **getattr(self.system, "last_logits", {})}


def _matching(chosen: Sequence[int], drafted: Sequence[int]) -> int:
    """How many of the drafted tokens the system chose as well, before the first difference."""
    for count, (mine, guess) in enumerate(zip(chosen, drafted, strict=False)):
        if mine != guess:
            return count
    return len(drafted)


def _trace(logits: Mapping[str, torch.Tensor], token: int, top: int) -> dict[str, Any]:
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
