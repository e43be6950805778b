"""What each part of the engine that is there for speed gains: the engine without it, and with it.

The ratio of a part is the time without it over the time with it; at 1 it gains nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

from bench_models import Triple, agreeing_triple, random_triple
from bench_workloads import Workload, interleaved, median_ratio, workload

import proxytune
from proxytune.engine import speculation
from proxytune.members import cached

Generate = Callable[..., object]
Gains = dict[str, dict[str, float]]


def packed_passes(size: Any, rounds: int, load: Any, generate: Generate) -> dict[str, float]:
    """Passes without padding, on workloads of mixed lengths."""
    triple = random_triple(size.mixed_base, size.mixed_small, size.device, size.dtype)
    generator, found = load(triple), {}
    for kind in ("uniform", "heavy_tailed"):
        work = workload(kind, max(size.batch, size.rows // 4), size.mixed_base.vocab, size.scale)
        run = partial(generate, generator, work, size.batch)
        found[kind] = _gain(run, partial(_without_packed_passes, generator), rounds, size.clock)
    return found


def narrow_products(size: Any, rounds: int, load: Any, generate: Generate) -> dict[str, float]:
    """Products of two to five tokens: drafted blocks, and few rows in lockstep."""
    triple = agreeing_triple(size.draft_pair[0], size.draft_pair[1], 0.8, size.device, size.dtype)
    switched = partial(patch.object, cached, "narrow_products", lambda *_: nullcontext())
    ways: dict[str, tuple[int, Any]] = {
        "drafts, acceptance 0.8": (1, "auto"),
        "lockstep, 2 rows": (2, False),
        "lockstep, 4 rows": (4, False),
    }
    found = {}
    for name, (rows, how) in ways.items():
        # A generator each, for it learns the times of drafted blocks.
        run = partial(generate, load(triple), _prompts(size, rows), rows, how)
        less = partial(generate, load(triple), _prompts(size, rows), rows, how)
        with switched():
            less()
        run()
        found[name] = _gain(run, switched, rounds, size.clock, less)
    return found


def adapted_drafts(size: Any, rounds: int, load: Any, generate: Generate) -> dict[str, float]:
    """Drafted blocks of a measured width, against three drafted tokens in every block."""
    found = {}
    for acceptance in size.acceptances:
        triple = agreeing_triple(
            size.draft_pair[0], size.draft_pair[1], acceptance, size.device, size.dtype
        )
        generator, work = load(triple), _prompts(size, 1)
        generate(generator, work, 1, "auto")
        runs: dict[str, Callable[[], object]] = {
            "fixed": partial(generate, generator, work, 1, 3),
            "auto": partial(generate, generator, work, 1, "auto"),
        }
        times = interleaved(runs, rounds, size.clock)
        found[str(acceptance)] = median_ratio(times["fixed"], times["auto"])
    return found


def probing(size: Any, rounds: int, load: Any, generate: Generate) -> dict[str, float]:
    """Trials of widths that are not in use: where the acceptance stays, and where it rises."""
    triples = {
        a: agreeing_triple(size.draft_pair[0], size.draft_pair[1], a, size.device, size.dtype)
        for a in (0.05, 0.8)
    }
    return {
        "acceptance 0.8": _probing([triples[0.8]], size, rounds, load, generate),
        "acceptance 0.05, then 0.8": _probing(
            [triples[0.05], triples[0.8]], size, rounds, load, generate
        ),
    }


def _probing(triples: list[Triple], size: Any, rounds: int, load: Any, generate: Generate) -> float:
    """One triple after the other, as if they were one whose texts change their kind."""
    work = _prompts(size, 1)

    def run() -> None:
        generators = [load(triple) for triple in triples]
        for generator in generators:
            generator._paces = generators[0]._paces
            for _ in range(4):
                generate(generator, work, 1, "auto")

    return _gain(run, _without_probing, rounds, size.clock)


def _gain(
    run: Callable[[], object],
    without: Callable[[], AbstractContextManager[object]],
    rounds: int,
    clock: Callable[[], float],
    other: Callable[[], object] | None = None,
) -> float:
    """The time of a run without a part over its time with it.

    Args:
        run: what is timed.
        without: the context in which the part is missing.
        rounds: the ratio is their median.
        clock: see `bench_cases.Size`.
        other: what is timed in that context; None for the same.
    """

    def less() -> None:
        with without():
            (other or run)()

    times = interleaved({"with": run, "without": less}, rounds, clock)
    return median_ratio(times["without"], times["with"])


@contextmanager
def _without_packed_passes(generator: proxytune.Generator) -> Iterator[None]:
    with ExitStack() as stack:
        for member in generator.system.members.values():
            stack.enter_context(patch.object(member, "joins", False))
        yield


@contextmanager
def _without_probing() -> Iterator[None]:
    never = 10**9
    with (
        patch.object(speculation, "FIRST_GAP", never),
        patch.object(speculation, "LAST_GAP", never),
    ):
        yield


def _prompts(size: Any, rows: int) -> Workload:
    """Some equal rows; their costs do not depend on their texts."""
    prompts = [
        [(7 * row + place) % size.draft_pair[0].vocab for place in range(16)] for row in range(rows)
    ]
    return Workload(prompts, [size.steps] * rows)


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "packed_passes": packed_passes,
    "narrow_products": narrow_products,
    "adapted_drafts": adapted_drafts,
    "probing": probing,
}


def gains(size: Any, rounds: int, load: Any, generate: Generate) -> Gains:
    """Part -> case -> the time without the part over the time with it.

    Args:
        size: a `bench_cases.Size`.
        rounds: each ratio is their median.
        load: triple -> generator.
        generate: runs a workload through a generator; `bench_cases._generate`.
    """
    return {f"gain_of_{name}": part(size, rounds, load, generate) for name, part in PARTS.items()}
