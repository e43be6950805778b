"""A run whose models are divided among processes: `torchrun ... machine.tensor_parallel=N`.

Rank 0 runs the experiment: it alone locks the folder, writes and shows. It tells the other ranks
each call that it makes of a system, and they make the same call (`follow`). What each rank would
decide by its own clock or memory, all take from rank 0: the width of drafted blocks, the number of
rows, and, so that no last digit of a logit can part them, every token.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch

from proxytune.engine.generation import Generation
from proxytune.engine.loop import DecodeLoop
from proxytune.engine.penalties import History
from proxytune.engine.sampling import Sampler
from proxytune.engine.speculation import Pace
from proxytune.errors import UserError
from proxytune.experiment.generate import ModelPool
from proxytune.generator import Generator, Pairs, Prompts, Speculative
from proxytune.loading.ranks import join, least, told, told_number, told_tokens
from proxytune.records import whole_number


class _ToldPace(Pace):
    """Rank 0's widths."""

    def width(self, rows: int) -> int:
        return told_number(super().width(rows))


class _ToldSampler(Sampler):
    """Rank 0's tokens."""

    def choose(
        self,
        logits: torch.Tensor,
        streams: Sequence[int],
        positions: Sequence[int],
        histories: Sequence[History] = (),
    ) -> torch.Tensor:
        return told_tokens(super().choose(logits, streams, positions, histories))


class _RanksLoop(DecodeLoop):
    def _shrink(self, error: BaseException) -> None:
        raise UserError(
            f"out of memory at {self._pass_rows} rows, and the ranks cannot go on with fewer: give "
            f"decoding.batch_size={max(1, self._pass_rows // 2)}"
        ) from error


class RanksGenerator(Generator):
    """A system of which each rank holds a part; all ranks make the same calls of it."""

    sampler_type = _ToldSampler

    @classmethod
    def of(cls, generator: Generator) -> Self:
        """The same system."""
        return cls(
            generator.members,
            generator.system,
            lambda: generator.sibling().system,
            generator.vocabulary,
        )

    def loop(
        self, batch_size: int | Literal["auto"] = "auto", speculative: Speculative = "auto"
    ) -> DecodeLoop:
        """A decode loop that keeps in step with those of the other ranks."""
        if batch_size != "auto":
            batch_size = whole_number("batch_size, where it is not 'auto',", batch_size, 1)
        return _RanksLoop(self.system, self._rows(batch_size), self._pace(speculative))

    def _pace(self, speculative: Speculative) -> Pace | None:
        self._paces.setdefault(None, _ToldPace())
        return super()._pace(speculative)

    def _rows(self, batch_size: int | Literal["auto"]) -> Callable[[int], int]:
        own, agreed = super()._rows(batch_size), dict[int, int]()

        def rows(tokens: int) -> int:
            if tokens not in agreed:  # asked in the same order by all ranks
                agreed[tokens] = least(own(tokens))
            return agreed[tokens]

        return rows


class LeadingGenerator(RanksGenerator):
    """Rank 0's: it tells the others what it is asked."""

    def generate(
        self,
        prompts: Prompts,
        *,
        on_finish: Callable[[Generation], None] | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """See `Generator.generate`."""
        told(("generate", (prompts,), settings))
        return super().generate(prompts, on_finish=on_finish, **settings)

    def loglikelihood(
        self, pairs: Pairs, *, batch_size: int | Literal["auto"] = "auto"
    ) -> list[tuple[float, bool]]:
        """See `Generator.loglikelihood`."""
        told(("loglikelihood", (pairs,), {"batch_size": batch_size}))
        return super().loglikelihood(pairs, batch_size=batch_size)


class LeadingPool:
    """Rank 0's pool of systems; use it as a context manager.

    Args:
        make_pool: makes a rank's pool; the others get it by pickle.
    """

    def __init__(self, make_pool: Callable[[], ModelPool]) -> None:
        self._make = make_pool

    def open(self, system: str) -> LeadingGenerator:
        """Loads the system in all ranks."""
        told(("open", (system,), {}))
        return LeadingGenerator.of(self._pool.open(system))

    def __enter__(self) -> "LeadingPool":
        join()
        told(self._make)
        self._pool = self._make()
        self._pool.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.__exit__(*raised)
        if raised[0] is None:  # else torchrun ends the others: they may be inside of a pass
            told(None)


def follow(threads: int | None) -> None:
    """What the other ranks do: the calls that rank 0 tells them, until it has no more.

    Args:
        threads: CPU threads of torch; None leaves them.
    """
    logging.disable(logging.WARNING)  # rank 0 says it
    if threads:
        torch.set_num_threads(threads)
    join()
    generator: RanksGenerator | None = None
    with told()() as pool:
        while (call := told()) is not None:
            method, arguments, settings = call
            if method == "open":
                generator = None  # its models would stay in memory beside the next ones
                generator = RanksGenerator.of(pool.open(*arguments))
            else:
                getattr(generator, method)(*arguments, **settings)
