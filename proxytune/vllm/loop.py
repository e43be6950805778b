"""A decode loop whose tokens vLLM chooses."""

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any

from proxytune.engine.base_loop import Loop
from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.rows import Finished, Rating, Request, Row, Shared
from proxytune.vllm.engine import Engine
from proxytune.vllm.requests import Listed, completion


class EngineLoop(Loop):
    """Continues many prompts with one vLLM engine; several loops may share it.

    Every sample is a request of vLLM's, which schedules them; so a row leaves as soon as it ends.

    Args:
        engine: the engine.
        limit: how many rows are given to vLLM at once.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._waiting: deque[Shared] = deque()
        self._running: dict[str, Row] = {}
        self._aside: set[int] = set()  # indices of requests that `pause` has set aside
        self._unread: deque[Shared] = deque()  # of these: what vLLM has not got
        self._held: dict[str, list[Any]] = {}  # and outputs of those that it has
        self._done: list[Finished] = []

    @property
    def running(self) -> int:
        """How many rows vLLM has, running or waiting there, but for those set aside."""
        return sum(row.request.index not in self._aside for row in self._running.values())

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits, or has ended and was not handed out."""
        return bool(self._at_work or self._waiting or self._done)

    @property
    def _at_work(self) -> int:
        """How many rows vLLM goes on with; of those set aside it may have ended some."""
        return len(self._running) - sum(held[-1].finished for held in self._held.values())

    @property
    def paused(self) -> int:
        """How many samples are set aside, those that have not begun included."""
        begun = len(self._running) - self.running
        return begun + sum(shared.unstarted for shared in self._unread)

    def pause(self, indices: Iterable[int]) -> None:
        """Sets the requests with these indices aside until `resume`. Call between steps.

        vLLM cannot pause: it goes on with the rows that it has. Their tokens are kept, at most
        `max_new_tokens` of each, and are written after `resume`.
        """
        self._aside |= set(indices)
        self._unread += [each for each in self._waiting if each.request.index in self._aside]
        self._waiting = deque(s for s in self._waiting if s.request.index not in self._aside)

    def resume(self, indices: Iterable[int]) -> None:
        """Lets requests that `pause` has set aside go on, and writes their tokens since then."""
        self._aside -= set(indices)
        self._waiting += [s for s in self._unread if s.request.index not in self._aside]
        self._unread = deque(s for s in self._unread if s.request.index in self._aside)
        back = [n for n in self._held if self._running[n].request.index not in self._aside]
        for name in back:
            for output in self._held.pop(name, ()):
                if name in self._running:  # the row may have ended before vLLM's request
                    self._take([name], self._running[name], output)

    def _wanted(self) -> int:
        return self._limit - self._at_work - len(self._waiting)

    def add(self, request: Request) -> None:
        """Queues a request until rows are free."""
        self._waiting.append(Shared(request))

    def step(self, more: bool = False) -> list[Finished]:
        """One pass of vLLM.

        Args:
            more: unused; vLLM schedules.

        Returns:
            The samples that have ended.
        """
        while self._waiting and self._at_work < self._limit:
            shared = self._waiting[0]
            self._submit(Row(shared))
            if not shared.unstarted:
                self._waiting.popleft()
        if self._at_work and not self._done:
            self._engine.step()
        done, self._done = self._done, []
        return done

    def _submit(self, row: Row) -> None:
        names: list[str] = []
        sink = partial(self._take, names, row)
        names.append(self._engine.submit(completion(row, self._engine.ours), sink))
        self._running[names[0]] = row

    def _take(self, names: list[str], row: Row, output: Any) -> None:
        """Writes the tokens of one output of vLLM's to its row."""
        (name,) = names
        if row.request.index in self._aside:
            self._held.setdefault(name, []).append(output)
            return
        part = output.outputs[0]
        if part.finish_reason in ("abort", "error"):
            raise RuntimeError(f"vLLM has given up a request: {part.finish_reason}")
        for place, token in enumerate(part.token_ids):
            row.write(token, Rating(partial(self._rate, part.logprobs, place, token)))
            if row.reason is not None:
                break
        if row.reason is None:
            assert not output.finished, "vLLM has ended a row that goes on"
            return
        self._engine.abort([name])
        del self._running[name]
        self._done.append(row.finished())

    def cancel(self, index: int) -> None:
        """Drops the requests with this index. Call between steps."""
        self._waiting = deque(each for each in self._waiting if each.request.index != index)
        self._unread = deque(each for each in self._unread if each.request.index != index)
        self._drop([n for n, row in self._running.items() if row.request.index == index])
        self._aside.discard(index)

    def clear(self) -> None:
        """Drops everything that runs or waits."""
        self._waiting.clear()
        self._unread.clear()
        self._done = []
        self._drop(list(self._running))
        self._aside.clear()

    def _drop(self, names: list[str]) -> None:
        self._engine.abort(names)
        for name in names:
            del self._running[name]
            self._held.pop(name, None)

    def _rate(self, listed: Any, place: int, token: int, top: int) -> TokenLogprob:
        """The rating of one token of an output."""
        return Listed(listed[place], self._engine.plan.vocab_size).rate(token, top)
