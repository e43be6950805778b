"""The decode loop: which rows run, what each writes, and when it ends.

One loop serves every system: it drives a `Member` (a single model or a triple) and cannot tell
which. Rows leave the moment they end and waiting prompts take their place; the samples of one
prompt share its prefill.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from proxytune.memory import out_of_memory
from proxytune.rows import Finished, Request, Row, Shared, certain_choices, choose, places
from proxytune.speculative import Pace
from proxytune.truncation import Truncation

log = logging.getLogger(__name__)


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
        self.rows: list[Row] = []
        self._max_rows = max_rows
        self._cap: int | None = None  # lowered when memory runs out
        self._tried = 0  # rows of the last pass
        self._width = 1  # of the last block
        self._waiting: deque[Request] = deque()
        self._joining: deque[Row] = deque()  # rows that the system has still to read
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
            advanced = self._admit(more)
            if self.rows and not advanced:
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

    def _admit(self, more: bool) -> bool:
        """Prefills waiting prompts into free rows and chooses their first tokens.

        Returns:
            Whether the running rows have taken a step in the same pass.
        """
        limit = self._limit()
        free = limit - len(self.rows)
        queue = len(self._joining) + len(self._waiting)
        if free <= 0 or not queue or (self.rows and more and free < limit // 8):
            return False
        reserved = 0  # rows for further samples of the prompts that join: copies, not prefilled
        while self._waiting and len(self._joining) + reserved < free:
            shared = Shared(self._waiting.popleft())
            self._joining.append(Row(shared))
            reserved += min(shared.left, free - len(self._joining) - reserved)
        new = list(self._joining)[:free]
        self._tried = len(self.rows) + len(new)
        alphas = [row.request.alpha for row in new]
        own = {} if all(alpha is None for alpha in alphas) else {"alphas": alphas}
        ahead = {"ahead": count} if (count := self._ahead(new)) else {}
        prompts = [row.prompt() for row in new]
        running = list(self.rows) if self._joins(new) else []
        if running:
            tokens = torch.tensor([row.tokens[-1] for row in running])
            logits = self.system.join(tokens, prompts, **own)
            stepped, logits = logits.tensor_split([len(running)])
            chosen = choose(stepped, running, [0] * len(running)).tolist()
            for row in running:
                row.fed += 1
            self._push(running, chosen, stepped, {})
            distributions = {"system": logits}
        else:
            logits = self.system.prefill(prompts, **own, **ahead)
            distributions = self._distributions(logits)
        truncation: Truncation | None = getattr(self.system, "truncation", None)
        sources, copies = [], []
        for index, row in enumerate(new):
            self._joining.popleft()
            row.fed = len(row.tokens)
            if row.shared.left and not row.tokens:
                row.shared.first_logits = {
                    r: each[index].clone() for r, each in distributions.items()
                }
                row.shared.first_truncation = truncation and truncation.rows(index)
            while row.shared.left and not row.tokens and len(new) + len(copies) < free:
                sources.append(len(self.rows) + index)
                copies.append(Row(row.shared))
        present = len(self.rows) + len(new)
        self.rows += [*new, *copies]
        self._tried = len(self.rows)
        if copies:
            self.system.keep([*range(present), *sources])
        chosen = choose(logits, new, [0] * len(new))
        if truncation is not None:
            certain = certain_choices(chosen, logits, truncation.ceiling, new, [0] * len(new))
            for row, sure, unseen in zip(new, certain, truncation.unseen.tolist(), strict=True):
                row.note(truncation, sure, unseen)
        self._push(new, chosen.tolist(), logits, distributions)
        self._begin(copies)
        self._retire()
        return bool(running)

    def _joins(self, new: Sequence[Row]) -> bool:
        """Whether the running rows can take a step in the pass that reads new prompts."""
        lockstep = self.pace is None or self._width == 1
        recording = any(row.trace is not None for row in (*self.rows, *new))
        return lockstep and not recording and getattr(self.system, "joins", False)

    def _begin(self, rows: list[Row]) -> None:
        """Chooses the first token of rows whose prompt has been read for an earlier sample."""
        if not rows:
            return
        firsts = [row.shared.first_logits for row in rows]
        stacked = {role: torch.stack([f[role] for f in firsts if f]) for role in firsts[0] or {}}
        chosen = choose(stacked["system"], rows, [0] * len(rows))
        for index, row in enumerate(rows):
            if known := row.shared.first_truncation:
                one = slice(index, index + 1)
                logits, ceiling = stacked["system"][one], known.ceiling.unsqueeze(0)
                (certain,) = certain_choices(chosen[one], logits, ceiling, [row], [0])
                row.note(known, certain, float(known.unseen))
        self._push(rows, chosen.tolist(), stacked["system"], stacked)

    def _ahead(self, rows: Sequence[Row]) -> int:
        """Tokens that a guess behind the rows' prompts should have."""
        if self.pace is None or any(row.trace is not None for row in rows):
            return 0
        left = max(row.request.max_new_tokens - len(row.tokens) for row in rows) - 1
        return min(self.pace.ahead(len(self.rows) + len(rows)), left)

    def _retire(self) -> None:
        """Hands out the rows that have ended; further samples of their prompts take their place."""
        while any(row.reason for row in self.rows):
            counts = [0] * len(self.rows)
            keep = list(range(len(self.rows)))
            fresh: list[Row] = []
            for index in reversed(range(len(self.rows))):
                row = self.rows[index]
                if row.reason is None:
                    continue
                self._done.append(row.finished())
                if row.shared.left:
                    counts[index] = row.fed
                    self.rows[index] = Row(row.shared)
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
        self._width = width
        if width == 1:
            logits = self.system.step(tokens)
            picked = choose(logits, rows, [0] * len(rows))
            drafted = [[]] * len(rows)
        else:

            def pick(logits: torch.Tensor, offset: int) -> torch.Tensor:
                return choose(logits, rows, [offset] * len(rows))

            block = self.system.draft(tokens, width, pick)
            logits = self.system.verify(block)
            picked = choose(logits.flatten(0, 1), *places(rows, width))
            drafted = block[:, 1:].tolist()
        chosen = picked.view(len(rows), width).tolist()
        truncation: Truncation | None = getattr(self.system, "truncation", None)
        certain, unseen = [], []
        if truncation is not None:
            certain = certain_choices(
                picked,
                logits.reshape(len(picked), -1),
                truncation.ceiling.reshape(len(picked), -1),
                *places(rows, width),
            )
            unseen = truncation.unseen.flatten().tolist()
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
                if truncation is not None:
                    place = index * width + offset
                    row.note(truncation, certain[place], unseen[place])
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
        rows: list[Row],
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
