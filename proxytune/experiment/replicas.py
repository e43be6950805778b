"""Replicas: several processes that each hold the whole system and share its prompts.

The driver is the process that a person started. It cuts the prompts into chunks; every replica
takes the next one as soon as it is free. The driver alone writes files. A sample depends on the
seed, its prompt's key and its number alone, so nothing depends on who makes it.

`Replicas` is what a cell drives, `Replica` what runs in each process. What connects them is a
`Crew`: `ray_crew.RayCrew`.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from proxytune.engine.generation import Generation
from proxytune.engine.memory import row_budget
from proxytune.engine.rows import Request
from proxytune.engine.system import Facts
from proxytune.errors import UserError
from proxytune.experiment.generate import ModelPool
from proxytune.generator import Generator, Pairs, Prompts, Speculative
from proxytune.loading.load import load_tokenizer
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import Vocabulary
from proxytune.proxy import SharedEnd

_CHUNK = 2  # chunks of so many times the rows that a replica decodes at once
_PAIRS = 256  # pairs whose log-likelihoods are one chunk


@dataclass(frozen=True)
class SystemFacts:
    """What the driver must know of a system that others run.

    Attributes:
        facts: role -> what is known of the model.
        sizes: role -> entries of its logits.
        ends: role -> tokens that end its text.
        vocab_size, alphas, end, vocabulary: as in `Generator`.
    """

    facts: Mapping[str, Facts]
    sizes: Mapping[str, int | None]
    ends: Mapping[str, frozenset[int]]
    vocab_size: int
    alphas: Mapping[str, float]
    end: SharedEnd | None
    vocabulary: Vocabulary | None


@dataclass(frozen=True)
class Answer:
    """A replica's answer to one call.

    Attributes:
        value: the result.
        seconds: that it took.
        processor: seconds of processor time that it took.
        place: "host, process 123", for the record.
    """

    value: Any
    seconds: float
    processor: float
    place: str


class Replica:
    """One process's copy of the systems; it opens whichever it is asked about.

    A replica that was killed and started again opens the system anew, so it keeps no other state.

    Args:
        make_pool: makes the pool that loads systems.
        threads: CPU threads of torch.
    """

    def __init__(self, make_pool: Callable[[], ModelPool], threads: int) -> None:
        torch.set_num_threads(threads)
        self._pool = make_pool()
        self._opened: tuple[str, Generator] | None = None

    def call(self, method: str, system: str, *arguments: Any) -> Answer:
        """Calls one of the methods below."""
        start, used = time.perf_counter(), time.process_time()
        value = getattr(self, method)(self._open(system), *arguments)
        place = f"{socket.gethostname()}, process {os.getpid()}"
        return Answer(value, time.perf_counter() - start, time.process_time() - used, place)

    def _open(self, system: str) -> Generator:
        if self._opened is None or self._opened[0] != system:
            self._opened = None  # its models would stay in memory beside the next ones
            self._opened = (system, self._pool.open(system))
        return self._opened[1]

    @staticmethod
    def describe(generator: Generator) -> SystemFacts:
        """What the driver must know."""
        return SystemFacts(
            facts={role: _fact(each) for role, each in generator.system.members.items()},
            sizes={role: each.output_size for role, each in generator.members.items()},
            ends={role: each.eos_ids for role, each in generator.members.items()},
            vocab_size=generator.system.vocab_size,
            alphas=dict(generator.alphas),
            end=generator.end,
            vocabulary=generator.vocabulary,
        )

    @staticmethod
    def rows(generator: Generator, tokens: int, batch_size: int | Literal["auto"]) -> int:
        """How many rows of so many tokens it decodes at once."""
        return row_budget(generator.system.members.values(), batch_size)(tokens)

    @staticmethod
    def generate(
        generator: Generator,
        prompts: Prompts,
        keys: Sequence[str],
        settings: Mapping[str, Any],
    ) -> list[Generation]:
        """See `Generator.generate`."""
        return generator.generate(prompts, sample_keys=keys, **settings)

    @staticmethod
    def loglikelihood(
        generator: Generator, pairs: Pairs, batch_size: int | Literal["auto"]
    ) -> list[tuple[float, bool]]:
        """See `Generator.loglikelihood`."""
        return generator.loglikelihood(pairs, batch_size=batch_size)


class Crew(Protocol):
    """Replicas in other processes, numbered from 0.

    Attributes:
        size: how many there are.
    """

    size: int

    def submit(self, replica: int, method: str, system: str, *arguments: Any) -> Any:
        """Begins `Replica.call`; a ticket for it. A replica that dies does its calls again."""
        ...

    def wait(self, tickets: Sequence[Any]) -> Any:
        """Waits until one of the calls has ended; its ticket."""
        ...

    def answer(self, ticket: Any) -> Answer:
        """The answer to a call; what it raised is raised here."""
        ...


@dataclass
class Ran:
    """What one replica has done, for run.json.

    Attributes:
        places: where it ran; several if it was killed and started again.
        prompts: that it answered (or pairs that it rated).
        tokens: that it generated.
        seconds: that it worked.
        processor: seconds of processor time that it took.
    """

    places: list[str] = field(default_factory=list)
    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    processor: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        times = {"seconds": self.seconds, "processor": self.processor}
        return asdict(self) | {name: round(each, 2) for name, each in times.items()}


@dataclass(eq=False)
class RemoteModel(LoadedModel):
    """A model whose weights are in other processes.

    Attributes:
        size: entries of its logits.
        ends: tokens that end its text.
    """

    size: int | None = None
    ends: frozenset[int] = frozenset()

    @property
    def output_size(self) -> int | None:
        """How many entries its logits have."""
        return self.size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a completion."""
        return self.ends


class Replicas(Generator):
    """A system that a crew runs; see `Generator`, whose `generate` and `loglikelihood` it has.

    It has no `system`: the replicas keep the rows.

    Args:
        crew: the replicas.
        system: the system's name.
        specs: role -> model.
        known: what a replica says of the system.
        ran: a record for each replica; it is added to.
    """

    def __init__(
        self,
        crew: Crew,
        system: str,
        specs: Mapping[str, ModelSpec],
        known: SystemFacts,
        ran: Sequence[Ran],
    ) -> None:
        self._crew = crew
        self._name = system
        self._ran = ran
        members = {
            role: RemoteModel(
                None, load_tokenizer(spec), spec, size=known.sizes[role], ends=known.ends[role]
            )
            for role, spec in specs.items()
        }
        self._describe(
            members,
            known.facts,
            known.vocab_size,
            known.alphas,
            known.end,
            known.vocabulary,
        )

    def _complete(
        self,
        requests: Sequence[Request],
        batch_size: int | Literal["auto"],
        speculative: Speculative,
        take: Callable[[Generation], None],
    ) -> None:
        """Continues requests; `take` gets chunk by chunk, in the order in which they arrive."""
        if not requests:
            return
        first = requests[0]  # a call has one setting for all of its prompts
        rows = self.ask(0, "rows", max(each.room for each in requests), batch_size)
        how = {"seed": first.seed, "record": first.record, "compare": first.compare}
        how |= {"speculative": speculative, "batch_size": batch_size, **vars(first.decoding)}

        def arguments(chunk: range) -> tuple[Any, ...]:
            part = [requests[index] for index in chunk]
            # token ids do not say what text an answer begins with
            prefixes = ["" if each.thought is None else each.thought.prefix for each in part]
            own = how | {"prefixes": prefixes}
            return [each.prompt for each in part], [each.key for each in part], own

        def give(chunk: range, found: list[Generation], ran: Ran) -> None:
            for each in found:
                ran.tokens += len(each.token_ids)
                take(replace(each, prompt_index=chunk[each.prompt_index]))

        chunks = _chunks(len(requests), self._crew.size, rows, first.decoding.n)
        self._spread("generate", chunks, arguments, give)

    def loglikelihood(
        self, pairs: Pairs, *, batch_size: int | Literal["auto"] = "auto"
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; see `Generator.loglikelihood`."""
        self._refuse_partial()
        contexts = self._contexts(pairs)
        encoded = [(ids, list(given)) for ids, (_, given) in zip(contexts, pairs, strict=True)]
        results: dict[int, tuple[float, bool]] = {}

        def take(chunk: range, found: list[tuple[float, bool]], ran: Ran) -> None:
            results.update(zip(chunk, found, strict=True))

        chunks = _chunks(len(encoded), self._crew.size, _PAIRS // _CHUNK, 1)
        self._spread(
            "loglikelihood", chunks, lambda chunk: (encoded[_slice(chunk)], batch_size), take
        )
        return [results[index] for index in range(len(encoded))]

    def loop(self, *_: Any, **__: Any) -> Any:
        """Refused: the replicas have loops of their own.

        Raises:
            UserError: always.
        """
        raise UserError("replicas generate whole lists of prompts; use one process for more")

    def logits(self, token_ids: Any) -> torch.Tensor:
        """Refused: nothing is gained by asking another process.

        Raises:
            UserError: always.
        """
        raise UserError("replicas give completions and log-likelihoods, no logits; use one process")

    def ask(self, replica: int, method: str, *arguments: Any) -> Any:
        """One call of one replica."""
        ticket = self._crew.submit(replica, method, self._name, *arguments)
        return self._crew.answer(self._crew.wait([ticket])).value

    def _spread(
        self,
        method: str,
        chunks: Sequence[range],
        arguments: Callable[[range], tuple[Any, ...]],
        take: Callable[[range, list[Any], Ran], None],
    ) -> None:
        """Gives each replica the next chunk as soon as it is free.

        Args:
            method: of `Replica`.
            chunks: indices of prompts.
            arguments: of the call for a chunk.
            take: gets each chunk and its result, in the order of arrival.
        """
        waiting = list(reversed(chunks))
        running: dict[Any, tuple[int, range]] = {}

        def send(replica: int) -> None:
            if waiting:
                chunk = waiting.pop()
                ticket = self._crew.submit(replica, method, self._name, *arguments(chunk))
                running[ticket] = (replica, chunk)

        for replica in range(self._crew.size):
            send(replica)
        while running:
            ticket = self._crew.wait(list(running))
            replica, chunk = running.pop(ticket)
            answer = self._crew.answer(ticket)
            send(replica)  # before the files are written
            ran = self._ran[replica]
            ran.prompts += len(chunk)
            ran.seconds += answer.seconds
            ran.processor += answer.processor
            if answer.place not in ran.places:
                ran.places.append(answer.place)
            take(chunk, answer.value, ran)


def open_replicas(
    crew: Crew, system: str, specs: Mapping[str, ModelSpec], ran: Sequence[Ran]
) -> Replicas:
    """Loads a system in every replica at once; arguments as for `Replicas`."""
    tickets = [crew.submit(each, "describe", system) for each in range(crew.size)]
    known = [crew.answer(ticket).value for ticket in tickets]
    return Replicas(crew, system, specs, known[0], ran)


def _chunks(count: int, replicas: int, rows: int, samples: int) -> list[range]:
    """Cuts prompts into chunks: large ones first, small ones so that all replicas end together.

    Args:
        count: prompts.
        replicas: how many share them.
        rows: that each decodes at once.
        samples: rows per prompt.
    """
    most = max(1, _CHUNK * rows // samples)
    least = max(1, rows // (2 * samples))
    chunks: list[range] = []
    start = 0
    while start < count:
        size = min(most, max(least, math.ceil((count - start) / (2 * replicas))))
        chunks.append(range(start, min(count, start + size)))
        start = chunks[-1].stop
    return chunks


def _slice(chunk: range) -> slice:
    return slice(chunk.start, chunk.stop)


def _fact(member: Facts) -> Facts:
    """A member's facts without the member."""
    fact = Facts()
    fact.vocab_size, fact.max_positions = member.vocab_size, member.max_positions
    fact.raw_logits, fact.complete = member.raw_logits, member.complete
    fact.eos_ids = member.eos_ids
    return fact
