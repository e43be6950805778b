"""What a triple costs: vocabulary, memory, seconds per token, and what drafting gains."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from proxytune.engine.memory import row_budget
from proxytune.engine.speculation import promised
from proxytune.records import Decoding

if TYPE_CHECKING:  # they import transformers' models, and most refusals come before those
    from proxytune.generator import Generator

PROMPT = "Question: What is the capital of France?\nAnswer:"
DRAFTED = 3  # tokens a block, when its time is measured
_STEPS, _WARM_UP = 8, 2


@dataclass(frozen=True)
class StepTimes:
    """The median time of one step of all rows, in seconds.

    Attributes:
        rows: how many decode at once.
        base: a token of the base alone.
        lockstep: a token of the system.
        block: a block of `DRAFTED` + 1 tokens; None where nothing drafts.
    """

    rows: int
    base: float
    lockstep: float
    block: float | None = None

    def gain(self, acceptance: float) -> tuple[int, float]:
        """What drafting promises.

        Args:
            acceptance: the share of drafted tokens that the system confirms.

        Returns:
            The tokens per block that promise most (1: lockstep does), and how many times lockstep's
            speed that is.
        """
        if self.block is None:
            return 1, 1.0
        return promised(acceptance, {1: self.lockstep, DRAFTED + 1: self.block})


@dataclass(frozen=True)
class Costs:
    """What a system of several models costs.

    Attributes:
        vocab_size: tokens that all members share.
        weights: role -> bytes of its weights; those that two members share count once.
        cache_per_token: bytes of all members' caches for one token of one row.
        longest: tokens of the longest row, prompt and completion.
        rows: how many such rows run at once.
        peak: bytes of GPU memory that were in use at most; None without a GPU.
        steps: measured times; none for a base behind an API.
    """

    vocab_size: int
    weights: dict[str, int]
    cache_per_token: int
    longest: int
    rows: int
    peak: int | None
    steps: list[StepTimes]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    generator: "Generator", alone: "Generator | None", lengths: Iterable[int], wanted: int
) -> Costs:
    """Measures a system in memory.

    Args:
        generator: the system.
        alone: its base as a system of its own; None for a base behind an API, whose time depends
            on its server.
        lengths: tokens of the rows that are to come.
        wanted: how many rows there are to decode.
    """
    members = generator.system.members
    longest = max(lengths, default=generator.max_positions or 1024)
    rows = min(row_budget(members.values())(longest), max(1, wanted))
    steps = []
    if alone is not None:
        for count in sorted({1, rows}):
            block = _seconds(generator, count, DRAFTED) if generator.can_draft else None
            base, lockstep = (_seconds(each, count) for each in (alone, generator))
            steps.append(StepTimes(count, base, lockstep, block))
    devices = {member.device for member in members.values() if member.device.type == "cuda"}
    return Costs(
        vocab_size=generator.vocab_size,
        weights=_weights(generator),
        cache_per_token=sum(sum(each.bytes_per_token().values()) for each in members.values()),
        longest=longest,
        rows=rows,
        peak=sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
        steps=steps,
    )


def _weights(generator: "Generator") -> dict[str, int]:
    """Role -> bytes of its weights that no earlier role has."""
    seen: set[int] = set()
    found = {}
    for role, member in generator.members.items():
        found[role] = 0
        for tensor in member.model.parameters() if member.model is not None else ():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[role] += tensor.nbytes
    return found


def _seconds(generator: "Generator", rows: int, drafted: int = 0) -> float:
    """The median time of a step of `rows` rows after a short prompt.

    Args:
        generator: the system.
        rows: how many decode at once.
        drafted: tokens that the expert drafts in each step.
    """
    steps = _STEPS + _WARM_UP
    decoding = Decoding(max_new_tokens=(steps + 1) * (drafted + 1), ignore_eos=True)
    loop = generator.loop(rows, drafted or False)
    for request in generator.requests([PROMPT] * rows, decoding):
        loop.add(request)
    times: list[float] = []
    try:
        loop.step()  # reads the prompts
        while loop.running == rows and len(times) < steps:
            start = time.perf_counter()
            loop.step()
            times.append(time.perf_counter() - start)
    finally:
        loop.clear()
    return statistics.median(times[_WARM_UP:] or times)


def confirmed(agreed: Sequence[dict[str, int]], role: str) -> float | None:
    """The share of tokens that a member alone would have chosen, too.

    Args:
        agreed: of completions, as in `Generation.extra["agreed"]`.
        role: the member's.

    Returns:
        None where no token was chosen.
    """
    total = sum(each["system"] for each in agreed)
    return sum(each.get(role, 0) for each in agreed) / total if total else None
