"""The benchmarks: each measures its parts in one run and returns their ratios.

Every function takes a size ("tiny" to try the code, "cpu", "gpu") and the number of rounds, and
returns {key: value} for the JSON file. docs/performance.md describes the keys.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import bench_without
import torch
from bench_models import (
    LLAMA_1B,
    LLAMA_7B,
    LLAMA_13B,
    SHAPE_3M,
    SHAPE_7M,
    SHAPE_10M,
    SHAPE_15M,
    SHAPE_30M,
    SHAPE_100M,
    SHAPE_TINIER,
    SHAPE_TINY,
    Shape,
    Triple,
    agreeing_triple,
    random_triple,
)
from bench_workloads import (
    Workload,
    bare_forwards,
    generate_batches,
    interleaved,
    lockstep,
    median_ratio,
    plain_generate,
    static_batches,
    workload,
)

import proxytune
from proxytune.errors import UserError
from proxytune.records import Decoding

ACCEPTANCES = (0.3, 0.5, 0.8, 0.95)
TABLE12 = {"8,512": (8, 512), "512,8": (512, 8), "8,8": (8, 8)}
PAPER_TABLE12 = {"8,512": 2.54, "512,8": 2.32, "8,8": 2.45}  # 13B, proxy over tuned

Results = dict[str, Any]

_STRATEGIES: tuple[tuple[str, Literal["auto", False]], ...] = (
    ("lockstep", False),
    ("auto", "auto"),
)


@dataclass(frozen=True)
class Size:
    """How large a benchmark is on one kind of machine.

    Attributes:
        base, small: shapes of the triple that decodes step by step.
        draft_pair: shapes for speculative decoding, ten to one in cost.
        mixed_base, mixed_small: shapes for the mixed workloads.
        pair: shapes that stand for 13B and 7B in Table 12.
        steps: tokens per row where the length is free.
        rows: prompts of a mixed workload.
        batch: rows at once in a mixed workload.
        scale: factor on the lengths of the mixed workloads.
        memory: rows and tokens per row of the memory benchmark.
        acceptances: shares of right guesses for speculative decoding.
        device, dtype: of the models.
        clock: the function that tells the time, in seconds.
    """

    base: Shape
    small: Shape
    draft_pair: tuple[Shape, Shape]
    mixed_base: Shape
    mixed_small: Shape
    pair: tuple[Shape, Shape]
    steps: int
    rows: int
    batch: int
    scale: float
    memory: tuple[int, int]
    acceptances: tuple[float, ...] = ACCEPTANCES
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    clock: Callable[[], float] = time.perf_counter


SIZES = {
    "tiny": Size(
        base=SHAPE_TINY,
        small=SHAPE_TINIER,
        draft_pair=(SHAPE_TINY, SHAPE_TINIER),
        mixed_base=SHAPE_TINY,
        mixed_small=SHAPE_TINIER,
        pair=(SHAPE_TINY, SHAPE_TINIER),
        steps=8,
        rows=8,
        batch=4,
        scale=0.03,
        memory=(4, 64),
    ),
    "cpu": Size(
        base=SHAPE_100M,
        small=SHAPE_10M,
        draft_pair=(SHAPE_100M, SHAPE_7M),
        mixed_base=SHAPE_15M,
        mixed_small=SHAPE_3M,
        pair=(SHAPE_30M, SHAPE_15M),
        steps=128,
        # At the end of a workload rows stay empty; with few prompts this counts too much (with
        # 128, at most 0.90 of the bound can be reached).
        rows=512,
        batch=8,
        scale=0.25,
        memory=(8, 512),
    ),
    "gpu": Size(
        base=LLAMA_13B,
        small=LLAMA_7B,
        draft_pair=(LLAMA_13B, LLAMA_1B),
        mixed_base=LLAMA_13B,
        mixed_small=LLAMA_7B,
        pair=(LLAMA_13B, LLAMA_7B),
        steps=128,
        rows=48,
        batch=8,
        scale=1.0,
        memory=(64, 256),
        device="cuda",
        dtype=torch.bfloat16,
    ),
}


def _load(triple: Triple, cuda_graphs: bool = False) -> proxytune.Generator:
    base, expert, antiexpert = triple.members
    return proxytune.load(base, expert, antiexpert, cuda_graphs=cuda_graphs)


def _prompts(rows: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows, length), generator=generator).tolist()


def _generate(
    generator: proxytune.Generator,
    work: Workload,
    batch: int,
    speculative: Literal["auto"] | bool | int = False,
) -> list[list[int]]:
    """Runs a workload through the engine; every row ends after its own number of tokens."""
    requests = generator.requests(work.prompts, Decoding(max_new_tokens=max(work.lengths)))
    requests = [
        replace(request, max_new_tokens=length)
        for request, length in zip(requests, work.lengths, strict=True)
    ]
    tokens: list[list[int]] = [[] for _ in requests]
    for finished in generator.loop(batch, speculative).run(requests):
        tokens[finished.index] = finished.token_ids
    assert [len(ids) for ids in tokens] == work.lengths
    return tokens


def decode(size: Size, rounds: int) -> Results:
    """A decoded token against the members' bare forward passes: all three, and the largest."""
    triple = random_triple(size.base, size.small, size.device, size.dtype)
    generator = _load(triple)
    over_sum, over_largest, over_lockstep, each = {}, {}, {}, {}
    for rows in (1, 8):
        work = Workload(_prompts(rows, 16, size.base.vocab), [size.steps] * rows)
        runs: dict[str, Callable[[], object]] = {
            role: partial(bare_forwards, model, rows, 16, size.steps)
            for role, model in zip(("base", "expert", "antiexpert"), triple.members, strict=True)
        }
        runs["lockstep"] = partial(_generate, generator, work, rows)
        if size.device != "cpu":
            recorded = _load(triple, cuda_graphs=True)
            runs["cuda_graphs"] = partial(_generate, recorded, work, rows)
        _generate(generator, Workload(work.prompts, [4] * rows), rows)
        times = interleaved(runs, rounds, size.clock)
        total = [
            sum(parts)
            for parts in zip(times["base"], times["expert"], times["antiexpert"], strict=True)
        ]
        over_sum[str(rows)] = median_ratio(times["lockstep"], total)
        over_largest[str(rows)] = median_ratio(times["lockstep"], times["base"])
        if "cuda_graphs" in times:
            over_lockstep[str(rows)] = median_ratio(times["cuda_graphs"], times["lockstep"])
        each[str(rows)] = {
            name: 1000 * median(values) / size.steps for name, values in times.items()
        }
    return {
        "lockstep_over_sum": over_sum,
        "lockstep_over_largest": over_largest,
        **({"cuda_graphs_over_lockstep": over_lockstep} if over_lockstep else {}),
        "milliseconds_per_step": each,
    }


def mixed(size: Size, rounds: int) -> Results:
    """Workloads of uneven lengths against static batches, `generate`, and the no-padding bound."""
    triple = random_triple(size.mixed_base, size.mixed_small, size.device, size.dtype)
    generator = _load(triple)
    speedup, over_generate, share, times_by_kind = {}, {}, {}, {}
    for kind in ("uniform", "heavy_tailed"):
        work = workload(kind, size.rows, size.mixed_base.vocab, size.scale)
        even = work.equalized(size.batch)
        runs: dict[str, Callable[[], object]] = {
            "engine": partial(_generate, generator, work, size.batch),
            "static": partial(static_batches, triple.members, work, size.batch),
            "generate_of_base": partial(generate_batches, triple.base, work, size.batch),
            # The bound is the faster of both: a slow loop must not make the engine look good.
            "bound_static": partial(static_batches, triple.members, even, size.batch),
            "bound_engine": partial(_generate, generator, even, size.batch),
        }
        _generate(generator, Workload(work.prompts[: size.batch], [2] * size.batch), size.batch)
        once = interleaved(runs, 1, size.clock)
        speedup[kind] = median_ratio(once["static"], once["engine"])
        over_generate[kind] = median_ratio(once["engine"], once["generate_of_base"])
        # The runs that the bar compares take part in every round, the slow ones in the first.
        again = {name: runs[name] for name in ("engine", "bound_static", "bound_engine")}
        more = interleaved(again, rounds - 1, size.clock)
        times = {name: values + more.get(name, []) for name, values in once.items()}
        bound = [
            min(pair) for pair in zip(times["bound_static"], times["bound_engine"], strict=True)
        ]
        share[kind] = median_ratio(bound, times["engine"])
        times_by_kind[kind] = {name: median(values) for name, values in times.items()}
        times_by_kind[kind]["row_steps"] = sum(work.lengths)
        times_by_kind[kind]["prompt_tokens"] = sum(map(len, work.prompts))
    return {
        "mixed_speedup": speedup,
        "mixed_over_generate_of_base": over_generate,
        "mixed_share_of_bound": share,
        "mixed_seconds": times_by_kind,
    }


def speculative(size: Size, rounds: int) -> Results:
    """Speculative against lockstep and against `generate` of a tuned model of the base's size.

    The base stands for the tuned model: it has the same size, and only the cost is measured. On a
    GPU both strategies replay CUDA graphs, for launches would hide what a smaller model saves.
    """
    names = (
        "speculative_speedup",
        "speculative_over_tuned",
        "lockstep_over_tuned",
        "speculative_acceptance",
        "speculative_cost_ratio",
    )
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for acceptance in size.acceptances:
        for name, ratio in _at_acceptance(size, rounds, acceptance).items():
            found[name][str(acceptance)] = ratio
    return found | {"speculative_speedup_at_batch_8": {"0.8": _speedup_at_batch_8(size, rounds)}}


def _at_acceptance(size: Size, rounds: int, acceptance: float) -> dict[str, float]:
    """The ratios of `speculative` at one acceptance."""
    triple = agreeing_triple(*size.draft_pair, acceptance, size.device, size.dtype)
    generator = _load(triple, cuda_graphs=size.device == "cuda")
    prompts = _prompts(rounds, 16, size.draft_pair[0].vocab, seed=5)
    _generate(generator, Workload(prompts[:1], [max(8, size.steps // 2)]), 1, "auto")
    plain_generate(triple.base, prompts[:1], 4)
    kept: dict[str, list[list[int]]] = {}

    def run(name: str, how: Literal["auto", False], work: Workload) -> None:
        kept[name] = _generate(generator, work, 1, how)

    texts: list[list[int]] = []
    times: dict[str, list[float]] = {"lockstep": [], "auto": [], "tuned": []}
    for prompt in prompts:
        work = Workload([prompt], [size.steps])
        runs: dict[str, Callable[[], object]] = {
            name: partial(run, name, how, work) for name, how in _STRATEGIES
        }
        runs["tuned"] = partial(plain_generate, triple.base, work.prompts, size.steps)
        for name, values in interleaved(runs, 1, size.clock).items():
            times[name] += values
        if size.dtype == torch.float32:
            assert kept["auto"] == kept["lockstep"], "speculation changed the text"
        texts.append(prompt + kept["lockstep"][0])
    forwards = interleaved(
        {
            "base": partial(bare_forwards, triple.base, 1, 16, 16),
            "expert": partial(bare_forwards, triple.expert, 1, 16, 16),
        },
        rounds,
        size.clock,
    )
    return {
        "speculative_speedup": median_ratio(times["lockstep"], times["auto"]),
        "speculative_over_tuned": median_ratio(times["auto"], times["tuned"]),
        "lockstep_over_tuned": median_ratio(times["lockstep"], times["tuned"]),
        "speculative_acceptance": _agreement(triple.expert, texts, 16),
        "speculative_cost_ratio": median_ratio(forwards["base"], forwards["expert"]),
    }


def _speedup_at_batch_8(size: Size, rounds: int) -> float:
    """Lockstep over speculative for 8 rows, at an acceptance of 0.8."""
    triple = agreeing_triple(*size.draft_pair, 0.8, size.device, size.dtype)
    work = Workload(_prompts(8, 16, size.draft_pair[0].vocab, seed=5), [size.steps] * 8)
    generator = _load(triple, cuda_graphs=size.device == "cuda")
    _generate(generator, Workload(work.prompts, [max(8, size.steps // 2)] * 8), 8, "auto")
    times = interleaved(
        {name: partial(_generate, generator, work, 8, how) for name, how in _STRATEGIES},
        rounds,
        size.clock,
    )
    return median_ratio(times["lockstep"], times["auto"])


@torch.inference_mode()
def _agreement(expert: Any, texts: list[list[int]], prompt: int) -> float:
    """How often the expert's greedy token is the one that the triple wrote.

    Args:
        expert: the model.
        texts: prompts and completions, of one length.
        prompt: tokens of each prompt; they are not counted.
    """
    ids = torch.tensor(texts, device=expert.device)
    guess = expert(ids).logits[:, prompt - 1 : -1].argmax(-1)
    return float((guess == ids[:, prompt:]).float().mean())


def table12(size: Size, rounds: int) -> Results:
    """The paper's Table 12: seconds per generation at batch 1, by (prompt, output) tokens."""
    triple = random_triple(*size.pair, size.device, size.dtype)
    generator = _load(triple)
    ratios, seconds = {}, {}
    for name, (prompt, output) in TABLE12.items():
        if size.scale < 0.1:  # to try the code; the benchmark has the paper's lengths
            prompt, output = (max(2, round(n * size.scale)) for n in (prompt, output))
        prompts = _prompts(1, prompt, size.pair[0].vocab)
        runs: dict[str, Callable[[], object]] = {
            "tuned": partial(plain_generate, triple.base, prompts, output),
            "plain_proxy": partial(lockstep, triple.members, prompts, output),
            "proxy": partial(_generate, generator, Workload(prompts, [output]), 1),
        }
        _generate(generator, Workload(prompts, [4]), 1)
        times = interleaved(runs, rounds, size.clock)
        ratios[name] = median_ratio(times["proxy"], times["tuned"])
        seconds[name] = {run: median(values) for run, values in times.items()}
    return {
        "table12_proxy_over_tuned": ratios,
        "table12_paper": PAPER_TABLE12,
        "table12_seconds": seconds,
    }


def memory(size: Size, rounds: int) -> Results:
    """Peak memory of a generation against weights plus caches, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(_measure_memory, (size,))
    return {
        "peak_memory_over_sum": measured["peak"] / (measured["weights"] + measured["caches"]),
        "memory_bytes": measured,
    }


def _measure_memory(size: Size) -> dict[str, int]:
    tiny = SIZES["tiny"]
    warm = _load(random_triple(tiny.base, tiny.small, size.device, size.dtype))
    _generate(warm, Workload(_prompts(2, 4, tiny.base.vocab), [4, 4]), 2)  # loads the libraries
    del warm
    rows, length = size.memory
    before = _resident("VmRSS", size.device)
    triple = random_triple(size.base, size.small, size.device, size.dtype)
    weights = sum(p.numel() * p.element_size() for m in triple.members for p in m.parameters())
    prompt = length // 4
    work = Workload(_prompts(rows, prompt, size.base.vocab), [length - prompt] * rows)
    _generate(_load(triple), work, rows)
    width = torch.finfo(size.dtype).bits // 8
    per_token = sum(
        2 * shape.layers * shape.hidden * width for shape in (size.base, size.small, size.small)
    )
    peak = _resident("VmHWM", size.device) - before
    return {"peak": peak, "weights": weights, "caches": rows * length * per_token}


def _resident(field: str, device: str) -> int:
    """Bytes in use now (VmRSS) or the most so far (VmHWM).

    Not Linux's ru_maxrss: a new process inherits its parent's.
    """
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() if field == "VmHWM" else 0
        return peak or torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise UserError("the memory benchmark reads /proc, which this system does not have")


def pocket(size: Size, rounds: int) -> Results:
    """Acceptance on the pocket family, per task. It is a count, the same at every size."""
    import bench_pocket

    return {"pocket_acceptance": bench_pocket.acceptance()}


def parts(size: Size, rounds: int) -> Results:
    """The engine without each of its parts for speed, over the engine with it."""
    return bench_without.gains(size, rounds, _load, _generate)


CASES: dict[str, Callable[[Size, int], Results]] = {
    "decode": decode,
    "mixed": mixed,
    "speculative": speculative,
    "table12": table12,
    "memory": memory,
    "pocket": pocket,
    "parts": parts,
}
