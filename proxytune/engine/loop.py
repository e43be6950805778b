"""The decode loop: which rows run, what each writes, and when it ends.

One loop serves every system and cannot tell which it drives. Rows leave the moment they end and
waiting prompts take their place; the samples of one prompt share its prefill.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from proxytune.engine.memory import out_of_memory
from proxytune.engine.rows import Finished, Request, Row, Shared, choose, choose_from, places
from proxytune.engine.speculation import Pace
from proxytune.engine.system import DraftingSystem, Pass, System

log = logging.getLogger(__name__)


class DecodeLoop:
    """Continues many prompts with one system.

    Args:
        system: what is driven; a `DraftingSystem` can decode speculatively.
        max_rows: how many rows may run at once, given the longest of them in tokens.
        pace: decides the width of speculative blocks; None for lockstep.
    """

    def __init__(self, system: System, max_rows: Callable[[int], int], pace: Pace | None) -> None:
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
            joining = self._next_rows(more)
            stepped = self._admit(joining) if joining else False
            if self.rows and not stepped:
                self._advance()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._shrink(error)
        done, self._done = self._done, []
        return done

    # -- who joins --------------------

    def _limit(self) -> int:
        rooms = [row.request.room for row in (*self.rows, *self._joining)]
        rooms += [request.room for request in self._waiting]
        limit = max(1, self._max_rows(max(rooms, default=1)))
        return min(limit, self._cap or limit)

    def _next_rows(self, more: bool) -> list[Row]:
        """The rows to read next: as many as are free, leaving room for their further samples."""
        limit = self._limit()
        free = limit - len(self.rows)
        queued = len(self._joining) + len(self._waiting)
        if free <= 0 or not queued or (self.rows and more and free < limit // 8):
            return []
        reserved = 0  # for further samples of the prompts that join: copies, not prefilled
        while self._waiting and len(self._joining) + reserved < free:
            shared = Shared(self._waiting.popleft())
            self._joining.append(Row(shared))
            reserved += min(shared.left, free - len(self._joining) - reserved)
        return list(self._joining)[:free]

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

    # -- joining and leaving --------------------

    def _admit(self, new: list[Row]) -> bool:
        """Reads new rows and chooses their first tokens.

        Returns:
            Whether the running rows have taken a step in the same pass.
        """
        running = list(self.rows)
        joined = bool(running) and self._can_join(new)
        self._tried = len(running) + len(new)
        prompts = [row.prompt() for row in new]
        alphas = [row.request.alpha for row in new]
        if joined:
            tokens = torch.tensor([row.tokens[-1] for row in running])
            seen = self.system.join(tokens, prompts, alphas)
            for row in running:
                row.fed += 1
            self._write(running, seen[: len(running)])
            seen = seen[len(running) :]
        else:
            seen = self.system.prefill(prompts, alphas, self._ahead(new))
        copies = self._seat(new, seen)
        self._write(new, seen)
        self._write_first(copies)
        self._retire()
        return joined

    def _can_join(self, new: Sequence[Row]) -> bool:
        """Whether the running rows can take a step in the pass that reads new prompts."""
        lockstep = self.pace is None or self._width == 1
        return lockstep and self.system.joins and not _traced((*self.rows, *new))

    def _ahead(self, rows: Sequence[Row]) -> int:
        """Tokens that the small model should guess after the rows' prompts."""
        if self.pace is None or _traced(rows):
            return 0
        left = max(row.request.max_new_tokens - len(row.tokens) for row in rows) - 1
        return min(self.pace.ahead(len(self.rows) + len(rows)), left)

    def _seat(self, new: list[Row], seen: Pass) -> list[Row]:
        """Adds rows that have just been read, and copies for further samples of their prompts."""
        free = self._limit() - len(self.rows)
        copies: list[Row] = []
        sources: list[int] = []
        for index, row in enumerate(new):
            self._joining.popleft()
            row.fed = len(row.tokens)
            if row.tokens or not row.shared.left:
                continue
            row.shared.first = seen.copy_of(index, with_members=row.trace is not None)
            while row.shared.left and len(new) + len(copies) < free:
                sources.append(len(self.rows) + index)
                copies.append(Row(row.shared))
        present = len(self.rows) + len(new)
        self.rows += [*new, *copies]
        self._tried = len(self.rows)
        if copies:
            self.system.keep([*range(present), *sources])
        return copies

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
            self._write_first(fresh)

    # -- writing --------------------

    def _advance(self) -> None:
        """Adds one block of tokens to every row: a single token, or what a draft got right."""
        rows = self.rows
        self._tried = len(rows)
        start = time.perf_counter()
        width = self._width = self._next_width()
        tokens = torch.tensor([row.tokens[-1] for row in rows])
        guesses, seen = self._draft(tokens, width) if width > 1 else ([], self.system.step(tokens))
        chosen = choose_from(seen.flat(), *places(rows, width))
        firsts = range(0, width * len(rows), width)
        right = [0] * len(rows)
        if width > 1:
            right = [
                _matching(chosen.tokens[first : first + width], guess)
                for first, guess in zip(firsts, guesses, strict=True)
            ]
        if self.pace is not None:
            self.pace.observe(len(rows), width, time.perf_counter() - start, right)
        for row, first, count in zip(rows, firsts, right, strict=True):
            row.fed += count + 1
            chosen.give(row, first, count + 1)
        if width > 1 and min(right) < width - 1:
            self.system.rollback([width - 1 - count for count in right])
        self._retire()

    def _next_width(self) -> int:
        """Tokens per row in the next block."""
        if self.pace is None or _traced(self.rows):
            return 1
        left = max(row.request.max_new_tokens - len(row.tokens) for row in self.rows)
        return min(self.pace.width(len(self.rows)), left)

    def _draft(self, tokens: torch.Tensor, width: int) -> tuple[list[list[int]], Pass]:
        """What the small model guesses after `tokens`, and the system's word on it."""
        assert isinstance(self.system, DraftingSystem)
        rows = self.rows

        def pick(logits: torch.Tensor, offset: int) -> torch.Tensor:
            return choose(logits, rows, [offset] * len(rows))

        block = self.system.draft(tokens, width, pick)
        return block[:, 1:].tolist(), self.system.verify(block)

    def _write(self, rows: Sequence[Row], seen: Pass) -> None:
        """Chooses each row's next token, from `seen` [rows, vocab]."""
        chosen = choose_from(seen, rows, [0] * len(rows))
        for place, row in enumerate(rows):
            chosen.give(row, place)

    def _write_first(self, rows: Sequence[Row]) -> None:
        """The first token of rows whose prompt has been read for an earlier sample."""
        firsts = [row.shared.first for row in rows if row.shared.first is not None]
        if firsts:
            self._write(rows, Pass.stack(firsts))


def _traced(rows: Iterable[Row]) -> bool:
    return any(row.trace is not None for row in rows)


def _matching(chosen: Sequence[int], drafted: Sequence[int]) -> int:
    """How many of the drafted tokens the system chose as well, before the first difference."""
    for count, (mine, guess) in enumerate(zip(chosen, drafted, strict=False)):
        if mine != guess:
            return count
    return len(drafted)
