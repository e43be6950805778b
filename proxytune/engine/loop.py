"""The decode loop: which rows run, what each writes, and when it ends.

A *row* is one sample of one prompt while it is written. Every step of the loop takes its rows
through five stages:

    schedule   which waiting rows join: `_next_rows`
    read       the system reads their prompts (`_admit`) or the running rows' tokens (`_advance`)
    choose     the next tokens, from the logits of that pass: `choose_from`
    write      each token to its row: `Row.take`
    retire     rows that have ended leave, and further samples take their places: `_retire`

One loop serves every system and cannot tell which one it drives. A row leaves as soon as it ends,
so no row waits for a longer one; all samples of a prompt share one pass over it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from proxytune.engine.base_loop import Loop
from proxytune.engine.choice import choose_from, pick_tokens
from proxytune.engine.memory import out_of_memory
from proxytune.engine.rows import Finished, Request, Row, Shared
from proxytune.engine.speculation import Pace
from proxytune.engine.system import DraftingSystem, Pass, System

log = logging.getLogger(__name__)


class DecodeLoop(Loop):
    """Continues many prompts with one system.

    Args:
        system: the system that decodes; a `DraftingSystem` can do so speculatively.
        max_rows: how many rows may run at once, given the length in tokens of the longest.
        pace: decides the width of speculative blocks; None for lockstep.
    """

    def __init__(self, system: System, max_rows: Callable[[int], int], pace: Pace | None) -> None:
        self.system = system
        self.pace = pace
        self.rows: list[Row] = []  # row i of the system is rows[i]
        self._max_rows = max_rows
        self._cap: int | None = None  # on the number of rows, once memory has run out
        self._pass_rows = 0  # in the last pass
        self._width = 1  # of the last block
        self._waiting: deque[Request] = deque()
        self._joining: deque[Row] = deque()  # rows that the system has not read yet
        self._paused: list[Row | Request] = []  # set aside until `resume`
        self._done: list[Finished] = []

    def add(self, request: Request) -> None:
        """Queues a request until rows are free."""
        self._waiting.append(request)

    @property
    def running(self) -> int:
        """How many rows run."""
        return len(self.rows)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.rows or self._waiting or self._joining)

    @torch.inference_mode()
    def step(self, more: bool = False) -> list[Finished]:
        """Reads the rows that join and adds one block of tokens to every row.

        Args:
            more: whether further requests are coming. If so, a few free rows may stay empty until
                several prompts can be read in one pass; if not, they are filled at once.

        Returns:
            The samples that have ended.
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

    def cancel(self, index: int) -> None:
        """Drops the requests with this index; their rows leave unfinished. Call between steps."""
        self._take_out({index})
        self._paused = [each for each in self._paused if _index(each) != index]

    @property
    def paused(self) -> int:
        """How many samples are set aside, those that have not begun included."""
        unstarted = {id(each.shared): each.shared.unstarted for each in self._rows_paused()}
        begun = sum(isinstance(each, Row) for each in self._paused)
        waiting = sum(each.decoding.n for each in self._paused if isinstance(each, Request))
        return begun + sum(unstarted.values()) + waiting

    def pause(self, indices: Iterable[int]) -> None:
        """Sets the requests with these indices aside until `resume`. Call between steps.

        Their rows leave the system; their texts do not change by it.
        """
        self._paused += self._take_out(set(indices))

    def resume(self, indices: Iterable[int]) -> None:
        """Lets requests that `pause` has set aside go on: rows that have begun are read again."""
        wanted = set(indices)
        back = [each for each in self._paused if _index(each) in wanted]
        self._paused = [each for each in self._paused if _index(each) not in wanted]
        self._joining.extend(each for each in back if isinstance(each, Row))
        self._waiting.extend(each for each in back if isinstance(each, Request))

    def _rows_paused(self) -> list[Row]:
        return [each for each in self._paused if isinstance(each, Row)]

    @torch.inference_mode()
    def _take_out(self, indices: set[int]) -> list[Row | Request]:
        """Removes what runs or waits for the requests with these indices, and returns it."""
        found: list[Row | Request] = [r for r in self.rows if r.request.index in indices]
        found += [row for row in self._joining if row.request.index in indices]
        found += [each for each in self._waiting if each.index in indices]
        self._waiting = deque(each for each in self._waiting if each.index not in indices)
        self._joining = deque(row for row in self._joining if row.request.index not in indices)
        keep = [i for i, row in enumerate(self.rows) if row.request.index not in indices]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[i] for i in keep]
            self.system.keep(keep)
        return found

    def clear(self) -> None:
        """Drops everything that runs or waits, and frees the system's memory."""
        self.rows, self._done, self._paused = [], [], []
        self._waiting.clear()
        self._joining.clear()
        self.system.clear()

    # -- schedule --------------------

    def _wanted(self) -> int:
        return self._limit() - len(self._waiting)

    def _limit(self) -> int:
        """How many rows may run, given the longest that runs or waits."""
        rooms = [row.request.room for row in (*self.rows, *self._joining)]
        rooms += [request.room for request in self._waiting]
        limit = max(1, self._max_rows(max(rooms, default=1)))
        return min(limit, self._cap or limit)

    def _next_rows(self, more: bool) -> list[Row]:
        """The rows to read next: one per waiting prompt, while rows are free.

        A prompt's further samples are copies of its first row. They need no reading, but each
        needs a row of its own, so free rows are kept for them.
        """
        limit = self._limit()
        free = limit - len(self.rows)
        queued = len(self._joining) + len(self._waiting)
        if free <= 0 or not queued or (self.rows and more and free < limit // 8):
            return []
        for_copies = 0
        while self._waiting and len(self._joining) + for_copies < free:
            shared = Shared(self._waiting.popleft())
            self._joining.append(Row(shared))
            for_copies += min(shared.unstarted, free - len(self._joining) - for_copies)
        return list(self._joining)[:free]

    def _shrink(self, error: BaseException) -> None:
        """Goes on with half as many rows after memory has run out.

        All rows leave the system and wait to be read again, with the tokens that they have
        written after their prompt; so their texts do not change.

        Raises:
            BaseException: `error`, where a single row was too much.
        """
        if self._pass_rows <= 1:
            raise error
        self._cap = self._pass_rows // 2
        log.warning("out of memory at %d rows: going on with %d", self._pass_rows, self._cap)
        for row in reversed(self.rows):
            self._joining.appendleft(row)
        self.rows = []
        self.system.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- read: new rows --------------------

    def _admit(self, new: list[Row]) -> bool:
        """Reads the prompts of new rows and writes their first tokens.

        Returns:
            Whether the running rows have taken a step in the same pass.
        """
        running = list(self.rows)
        stepped = bool(running) and self._can_join(new)
        self._pass_rows = len(running) + len(new)
        prompts = [row.prompt() for row in new]
        own = [row.request.combination for row in new]
        if stepped:
            seen = self.system.join(_last_tokens(running), prompts, own)
            for row in running:
                row.fed += 1
            self._write(running, seen[: len(running)])
            seen = seen[len(running) :]
        else:
            seen = self.system.prefill(prompts, own, self._ahead(new))
        copies = self._seat(new, seen)
        self._write(new, seen)
        self._write_first(copies)
        self._retire()
        return stepped

    def _can_join(self, new: Sequence[Row]) -> bool:
        """Whether the running rows can take a step in the pass that reads new prompts."""
        lockstep = self.pace is None or self._width == 1
        return lockstep and self.system.joins and not _traced((*self.rows, *new))

    def _ahead(self, new: Sequence[Row]) -> int:
        """How many tokens the small model guesses after the prompts of new rows."""
        if self.pace is None or _traced(new):
            return 0
        return min(self.pace.ahead(len(self.rows) + len(new)), _tokens_left(new) - 1)

    def _seat(self, new: list[Row], seen: Pass) -> list[Row]:
        """Adds new rows, which the system has read, to the running ones, each with its copies.

        Args:
            new: the rows.
            seen: the pass over their prompts, [rows, vocab].

        Returns:
            Copies for further samples of the prompts, as many as there are free rows. They come
            after the new rows; their first tokens are still to be chosen.
        """
        free = self._limit() - len(self.rows)
        copies: list[Row] = []
        sources: list[int] = []  # the row that each of them copies
        for index, row in enumerate(new):
            self._joining.popleft()
            row.fed = len(row.tokens)
            if row.tokens or not row.shared.unstarted:
                continue
            row.shared.after_prompt = seen.copy_of(index, row.reads_members)
            while row.shared.unstarted and len(new) + len(copies) < free:
                sources.append(len(self.rows) + index)
                copies.append(Row(row.shared))
        present = len(self.rows) + len(new)
        self.rows += [*new, *copies]
        self._pass_rows = len(self.rows)
        if copies:
            self.system.keep([*range(present), *sources])
        return copies

    # -- read: running rows --------------------

    def _advance(self) -> None:
        """Adds a block to every row: one token, and the guesses that the system also chooses."""
        rows = self.rows
        self._pass_rows = len(rows)
        start = time.perf_counter()
        width = self._width = self._next_width()
        guesses, seen = self._read_block(width)
        chosen = choose_from(seen.flat(), rows, width, guesses)
        right = [_matching(chosen.of(index), guess) for index, guess in enumerate(guesses)]
        if self.pace is not None:
            self.pace.observe(len(rows), width, time.perf_counter() - start, right)
        for index, (row, count) in enumerate(zip(rows, right, strict=True)):
            given = chosen.give(index, row, 1 + count)
            # of a row that goes on, the system forgets what was drafted after the last token
            right[index] = count if row.reason is not None else given - 1
            row.fed += 1 + right[index]
        if min(right) < width - 1:
            self.system.rollback([width - 1 - count for count in right])
        self._retire()

    def _next_width(self) -> int:
        """Tokens per row in the next block; 1 is lockstep."""
        if self.pace is None or _traced(self.rows):
            return 1
        return min(self.pace.width(len(self.rows)), _tokens_left(self.rows))

    def _read_block(self, width: int) -> tuple[list[list[int]], Pass]:
        """Lets the system read a block: each row's last token, then width - 1 guesses.

        Returns:
            The small model's guesses, [rows, width - 1], and the system's pass over the block.
        """
        rows = self.rows
        tokens = _last_tokens(rows)
        if width == 1:
            return [[] for _ in rows], self.system.step(tokens)
        assert isinstance(self.system, DraftingSystem)

        guesses: list[list[int]] = [[] for _ in rows]
        # To read guesses from the device takes time, so this happens where a sampler needs them.
        looks_back = any(row.sampler.looks_back for row in rows)

        def pick(logits: torch.Tensor, offset: int) -> torch.Tensor:
            # A guess must be a token; `choose_from` decides where there is none to choose.
            tokens = pick_tokens(logits, rows, [offset] * len(rows), guesses).clamp(min=0)
            if looks_back:
                for own, token in zip(guesses, tokens.tolist(), strict=True):
                    own.append(token)
            return tokens

        block = self.system.draft(tokens, width, pick)
        return block[:, 1:].tolist(), self.system.verify(block)

    # -- choose and write --------------------

    def _write(self, rows: Sequence[Row], seen: Pass) -> None:
        """Chooses and writes each row's next token.

        Args:
            rows: the rows.
            seen: the pass that read their last tokens, [rows, vocab].
        """
        chosen = choose_from(seen, rows)
        for index, row in enumerate(rows):
            chosen.give(index, row)

    def _write_first(self, rows: Sequence[Row]) -> None:
        """Writes the first tokens of rows whose prompt was read for an earlier sample."""
        passes = [r.shared.after_prompt for r in rows if r.shared.after_prompt is not None]
        if passes:
            self._write(rows, Pass.stack(passes))

    # -- retire --------------------

    def _retire(self) -> None:
        """Hands out the rows that have ended.

        A further sample of the same prompt takes the row's place: the system keeps the prompt and
        forgets the rest. Where there is none, the last row moves into the gap.
        """
        while any(row.reason for row in self.rows):  # again, where a first token ends its sample
            forget = [0] * len(self.rows)  # tokens
            keep = list(range(len(self.rows)))
            fresh: list[Row] = []
            for index in reversed(range(len(self.rows))):
                row = self.rows[index]
                if row.reason is None:
                    continue
                self._done.append(row.finished())
                if row.shared.unstarted:
                    forget[index] = row.fed
                    self.rows[index] = Row(row.shared)
                    fresh.append(self.rows[index])
                    continue
                last, last_row = keep.pop(), self.rows.pop()
                if index < len(keep):
                    keep[index], self.rows[index] = last, last_row
            if any(forget):
                self.system.rollback(forget)
            if len(keep) < len(forget):
                self.system.keep(keep)
            self._write_first(fresh)


def _index(each: Row | Request) -> int:
    return each.request.index if isinstance(each, Row) else each.index


def _last_tokens(rows: Sequence[Row]) -> torch.Tensor:
    """Each row's last token, which the system has not read yet, [rows]."""
    return torch.tensor([row.tokens[-1] for row in rows])


def _tokens_left(rows: Iterable[Row]) -> int:
    """The most tokens that any row may still write."""
    return max(row.request.max_new_tokens - len(row.tokens) for row in rows)


def _traced(rows: Iterable[Row]) -> bool:
    """Whether any row records a trace; such rows decode in lockstep."""
    return any(row.trace is not None for row in rows)


def _matching(chosen: Sequence[int], guesses: Sequence[int]) -> int:
    """How many guesses are the system's own choices, before the first that is not.

    Args:
        chosen: the system's choices, [width].
        guesses: the small model's, [width - 1].
    """
    for count, (choice, guess) in enumerate(zip(chosen, guesses, strict=False)):
        if choice != guess:
            return count
    return len(guesses)
