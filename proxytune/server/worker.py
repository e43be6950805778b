"""The worker: one thread per system that runs the jobs of all clients in one decode loop.

Clients are served by asyncio, models run in the worker's thread. Jobs reach the thread through a
queue of commands; its events come back through each job's own asyncio queue.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from proxytune.engine.combining import Combination
from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.memory import out_of_memory
from proxytune.engine.rows import Finished, Rating, Request, longest
from proxytune.engine.system import Prompt
from proxytune.generator import Generator, Speculative
from proxytune.server.turns import Turns

log = logging.getLogger(__name__)

RATED_TOKENS = 4096  # prompt tokens, padding included, rated between two decoding steps
# Tokens and listed log-probabilities of a stream that wait for its reader. Above the first number
# its rows are set aside, below the second they go on.
PAUSE_ABOVE, RESUME_BELOW = 20_000, 5_000


class BusyError(Exception):
    """Too many completions wait already; the client should ask again later."""


class WorkerError(Exception):
    """The worker has failed or ended; the server's log says why."""


class EndingError(WorkerError):
    """The server ends before the job does."""


@dataclass(frozen=True)
class Piece:
    """One more token of a sample.

    Attributes:
        prompt: the prompt's place in the job.
        sample: the sample's number.
        id: the token; `NOTHING` where none could be chosen.
        text: the text that became certain by the token; see `engine.rows.Request.on_token`.
        token: its log-probability; None where the job asks for none.
        members: the system's and the members' log-probabilities of it by role ("system" is the
            whole system); None where the job asks for none.
        drafted: whether the small model had guessed it.
    """

    prompt: int
    sample: int
    id: int
    text: str
    token: TokenLogprob | None
    members: dict[str, TokenLogprob] | None = None
    drafted: bool = False


@dataclass(frozen=True)
class Ended:
    """A sample has ended; `prompt` is the prompt's place in the job."""

    prompt: int
    finished: Finished


@dataclass(frozen=True)
class Rated:
    """The log-probabilities of a prompt's tokens."""

    prompt: int
    tokens: list[TokenLogprob | None]


@dataclass(frozen=True)
class Failed:
    """The worker had to give the job up."""

    error: BaseException


Event = Piece | Ended | Rated


def can_rate(generator: Generator) -> bool:
    """Whether prompts can be rated on rows of their own; a base behind an API has none."""
    return all(each.member is None for each in generator.members.values())


@dataclass(eq=False)
class Job:
    """The part of one HTTP request that needs the models.

    Attributes:
        requests: prompts to be continued; their `index` is their place in this list.
        rate: prompts whose tokens get their log-probabilities, each role -> token ids.
        top: tokens listed per generated token; None asks for no log-probabilities.
        members_top: the same for each member; None asks for no log-probabilities of members.
        rate_top: tokens listed per token of a rated prompt.
        combination: this job's own formula and alphas; None is the system's.
        pieces: whether `Piece` events are wanted although no log-probabilities are.
        streams: whether the client reads while it is written, so that it may be paused.
    """

    requests: list[Request] = field(default_factory=list)
    rate: list[Prompt] = field(default_factory=list)
    top: int | None = None
    members_top: int | None = None
    rate_top: int = 0
    combination: Combination | None = None
    pieces: bool = False
    streams: bool = False
    _queue: asyncio.Queue[list[Event | Failed]] = field(default_factory=asyncio.Queue)
    _pending: list[Event | Failed] = field(default_factory=list)
    _home: asyncio.AbstractEventLoop | None = None
    # What `unread` is the difference of: each number is written by one thread alone.
    _given: int = 0
    _taken: int = 0
    _each: int = 1  # what one event adds
    _paused: bool = False

    @property
    def left(self) -> int:
        """How many samples and ratings the whole job has."""
        return sum(request.decoding.n for request in self.requests) + len(self.rate)

    @property
    def unread(self) -> int:
        """Tokens and listed log-probabilities that wait for the client."""
        return self._given - self._taken


class Worker:
    """Runs jobs on one system until it is closed.

    Args:
        generator: the system; nobody else may decode with it meanwhile.
        max_waiting: samples that may wait for a row; while as many wait, new jobs are refused.
        batch_size: rows at once; "auto" goes by the free memory.
        speculative: as for `Generator.generate`.
        rate: whether jobs may have prompts rated.
        turns: held during each pass; workers whose systems share models share it.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        max_waiting: int = 512,
        batch_size: Any = "auto",
        speculative: Speculative = "auto",
        rate: bool = True,
        turns: Turns | None = None,
    ) -> None:
        self.generator = generator
        self._turns = turns or Turns()
        self.max_waiting = max_waiting
        self._loop = generator.loop(batch_size, speculative)
        # The same weights with rows of their own: prompts are rated while completions run.
        self._rater = generator.sibling() if rate and can_rate(generator) else None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, tuple[Job, int]] = {}  # the loop's index -> job, place in it
        self._to_rate: deque[tuple[Job, int]] = deque()  # job, the prompt's place in it
        self._open: set[Job] = set()  # submitted and not cancelled; the event loop's
        self._left: dict[Job, int] = {}  # samples and ratings that a job still waits for
        self._rated_tokens = RATED_TOKENS  # lowered when memory runs out
        self._next = 0  # the loop's index for the next request
        self._unfinished = 0  # samples and ratings of all submitted jobs; both threads count
        self._counting = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for asyncio --------------------

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """How many rows decode."""
        return self._loop.running

    @property
    def waiting(self) -> int:
        """How many samples and ratings have not begun."""
        return max(0, self._unfinished - self.running - self._loop.paused)

    @property
    def jobs(self) -> int:
        """How many jobs await their end, or their client."""
        return len(self._open)

    def submit(self, job: Job) -> None:
        """Lets a job begin; `events` reports on it.

        Raises:
            BusyError: `max_waiting` samples wait already.
            WorkerError: the worker has ended.
        """
        if self._ending:
            raise EndingError("the server is shutting down")
        if not self.alive:
            raise WorkerError("the engine has ended")
        if self.waiting >= self.max_waiting:
            raise BusyError(f"{self.waiting} completions are waiting already")
        job._home = asyncio.get_running_loop()
        for top, lists in ((job.top, 1), (job.members_top, 1 + len(self.generator.roles))):
            job._each += lists * (self.generator.vocab_size if top == -1 else top or 0)
        self._open.add(job)
        self._count(job.left)
        self._commands.put(partial(self._add, job))

    async def events(self, job: Job, seconds: float) -> AsyncIterator[Event]:
        """Yields a job's events until all of it has ended; ratings come before completions.

        Raises:
            TimeoutError: the job takes longer than `seconds`.
            WorkerError: the worker failed, or ends.
        """
        left, end = job.left, time.monotonic() + seconds
        while left:
            async with asyncio.timeout(end - time.monotonic()):
                events = await job._queue.get()
            for event in events:
                if isinstance(event, Failed):
                    if isinstance(event.error, EndingError):
                        raise event.error
                    raise WorkerError("the engine failed") from event.error
                left -= not isinstance(event, Piece)
                yield event
                # a stream comes back here after the client has taken the event
                if self._ending and left:
                    raise EndingError("the server is shutting down")
            job._taken += job._each * len(events)
            if job._paused and job.unread < RESUME_BELOW:
                self._commands.put(partial(self._resume, job))

    def cancel(self, job: Job) -> None:
        """Drops the unfinished samples and ratings of a job; its rows become free."""
        self._open.discard(job)
        self._commands.put(partial(self._cancel, job))

    def stop(self) -> None:
        """Ends all jobs with an `EndingError`, and the thread after its present step."""
        self._ending = True
        for job in self._open:
            job._queue.put_nowait([Failed(EndingError("the server is shutting down"))])
        self._commands.put(None)

    def close(self) -> None:
        """Ends the thread; jobs that still run fail."""
        self._commands.put(None)
        self._thread.join(timeout=10)

    # -- in the thread --------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._take_commands():
                    self._fail(EndingError("the server is shutting down"))
                    self._send()
                    return
                with self._turns:
                    self._rate()
                    ended = self._loop.step() if self._loop.busy else []
                for finished in ended:
                    job, place = self._jobs[finished.index]
                    self._report(job, Ended(place, finished))
            except Exception as error:  # any bug fails the jobs it met, and the server lives on
                log.exception("the engine failed; its %d jobs are lost", len(self._left))
                self._fail(error)
            self._send()

    def _take_commands(self) -> bool:
        """Runs the commands in the queue, and waits for one if there is no other work.

        Returns:
            False when the thread is to end.
        """
        wait = not self._loop.busy and not self._to_rate
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _count(self, change: int) -> None:
        with self._counting:
            self._unfinished += change

    def _add(self, job: Job) -> None:
        self._left[job] = job.left
        self._to_rate.extend((job, place) for place in range(len(job.rate)))
        if not job.rate:
            self._start(job)

    def _start(self, job: Job) -> None:
        """Gives the requests of a job to the loop, after its prompts have been rated."""
        for place, request in enumerate(job.requests):
            index = self._next
            self._next += 1
            self._jobs[index] = (job, place)
            watched = job.pieces or job.top is not None or job.members_top is not None
            self._loop.add(
                replace(
                    request,
                    index=index,
                    combination=job.combination,
                    on_token=partial(self._watch, job, place) if watched else None,
                    top=job.top,
                    shows_members=job.members_top is not None,
                )
            )

    def _cancel(self, job: Job) -> None:
        if job not in self._left:
            return
        for index in self._indices(job):
            self._loop.cancel(index)
            del self._jobs[index]
        self._to_rate = deque(each for each in self._to_rate if each[0] is not job)
        self._count(-self._left.pop(job, 0))

    def _indices(self, job: Job) -> list[int]:
        return [index for index, (owner, _) in self._jobs.items() if owner is job]

    def _pause(self, job: Job) -> None:
        """Sets the rows of a job aside until its client has read."""
        job._paused = True
        self._loop.pause(self._indices(job))
        if job.unread < RESUME_BELOW:  # the client has read meanwhile, and saw no pause
            self._resume(job)

    def _resume(self, job: Job) -> None:
        if job._paused and job in self._left:
            job._paused = False
            self._loop.resume(self._indices(job))

    def _watch(
        self, job: Job, place: int, sample: int, token: int, text: str, rating: Rating
    ) -> None:
        rated = members = None
        if job.top is not None and token >= 0:
            rated = rating.of(job.top)
        if job.members_top is not None and token >= 0:
            members = {"system": rating.of(job.members_top), **rating.of_members(job.members_top)}
        piece = Piece(place, sample, token, text, rated, members, rating.drafted)
        job._pending.append(piece)

    def _rate(self) -> None:
        """Rates as many waiting prompts as fit into one pass."""
        batch: list[tuple[Job, int]] = []
        width = 0
        while self._to_rate:
            job, place = self._to_rate[0]
            width = max(width, longest(job.rate[place]))
            if batch and width * (len(batch) + 1) > self._rated_tokens:
                break
            batch.append(self._to_rate.popleft())
        if not batch:
            return
        assert self._rater is not None  # without one, `prepare` refuses such requests
        try:
            rated = self._rater.rate(
                [job.rate[place] for job, place in batch],
                [job.combination for job, _ in batch],
                [job.rate_top for job, _ in batch],
            )
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
            self._rated_tokens //= 2
            log.warning("out of memory: rating %d tokens at a time", self._rated_tokens)
            self._to_rate.extendleft(reversed(batch))
            return
        for (job, place), tokens in zip(batch, rated, strict=True):
            self._report(job, Rated(place, tokens))
            if place == len(job.rate) - 1:
                self._start(job)

    def _report(self, job: Job, event: Ended | Rated) -> None:
        job._pending.append(event)
        self._left[job] -= 1
        self._count(-1)

    def _fail(self, error: BaseException) -> None:
        self._loop.clear()
        self._to_rate.clear()
        for job in self._left:
            job._pending.append(Failed(error))
            self._count(-self._left[job])
            self._left[job] = 0

    def _send(self) -> None:
        """Sends the round's events to their jobs, and forgets the jobs that have ended."""
        for job in [job for job in self._left if job._pending]:
            events, job._pending = job._pending, []
            job._given += job._each * len(events)
            assert job._home is not None
            try:
                job._home.call_soon_threadsafe(job._queue.put_nowait, events)
            except RuntimeError:  # its event loop is closed: the client has no server any more
                self._cancel(job)
        for job, left in self._left.items():
            if left and job.streams and not job._paused and job.unread > PAUSE_ABOVE:
                self._pause(job)
        ended = [job for job, left in self._left.items() if left == 0]
        for job in ended:
            del self._left[job]
        if ended:
            self._jobs = {i: owner for i, owner in self._jobs.items() if owner[0] in self._left}
