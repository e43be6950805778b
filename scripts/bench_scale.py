"""Throughput of two replicas on Ray over that of one, in turns on one machine; docs/scale.md.

python scripts/bench_scale.py --json results/bench/scale.json

Each replica has one thread. The driver's share and the cost of a call are measured beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli.guard import guarded
from proxytune.files import ROOT, read_rows, write_json
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.roles import MEMBERS

if TYPE_CHECKING:
    from proxytune.experiment.replicas import Crew, Ran, Replicas

SYSTEM = "proxy"
MODELS = ROOT / "pocket" / "models"
SPECS = {
    role: ModelSpec(str(MODELS / role), dtype="float32", format=PromptFormat(kind))
    for role, kind in (("base", "raw"), ("expert", "chat"), ("antiexpert", "raw"))
}


@dataclass
class First:
    """A crew of which only the first replicas are used."""

    crew: "Crew"
    size: int

    def __post_init__(self) -> None:
        self.submit, self.wait = self.crew.submit, self.crew.wait
        self.answer = self.crew.answer


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = measure(given.replicas, given.rounds, given.prompts, given.tokens)
    print(json.dumps(found, indent=2))
    if given.json:
        write_json(given.json, found)


def measure(count: int, rounds: int, prompts: int, tokens: int) -> dict[str, Any]:
    """The medians over the rounds; seconds, and tokens per second.

    Args:
        count: replicas that are compared with one.
        rounds: of one, then all.
        prompts: per round.
        tokens: of every completion.
    """
    # torch is imported where it is needed, so that --help comes at once
    from proxytune.experiment.generate import ModelPool
    from proxytune.experiment.ray_crew import RayCrew
    from proxytune.experiment.replicas import Replica
    from proxytune.provenance import hardware

    pool = partial(ModelPool, SPECS, {SYSTEM: MEMBERS[SYSTEM]}, alpha=1.0, cuda_graphs=False)
    began = time.perf_counter()
    crew = RayCrew(count, partial(Replica, pool, 1), gpus=lambda total: 0, threads=1, address=None)
    started = time.perf_counter()
    try:
        opened = {size: _open(First(crew, size)) for size in (count, 1)}
        loaded = time.perf_counter()
        times: dict[int, list[dict[str, float]]] = {1: [], count: []}
        asked = _prompts(prompts)
        for each in opened.values():
            _round(*each, asked[:16], tokens)  # warms up
        for number in range(rounds):
            for size in (1, count) if number % 2 == 0 else (count, 1):
                times[size].append(_round(*opened[size], asked, tokens))
        call = _call_seconds(opened[1][0])
    finally:
        crew.close()
    medians = {
        size: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for size, runs in times.items()
    }
    ratio = medians[count]["tokens_per_second"] / medians[1]["tokens_per_second"]
    return {
        "replicas": count,
        "throughput_ratio": round(ratio, 3),
        "one": medians[1],
        "all": medians[count],
        "start_of_ray_s": round(started - began, 1),
        "loading_s": round(loaded - started, 1),
        "call_s": round(call, 5),
        "hardware": hardware(),
    }


def _open(crew: First) -> "tuple[Replicas, list[Ran]]":
    from proxytune.experiment.replicas import Ran, open_replicas

    ran = [Ran() for _ in range(crew.size)]
    specs = {role: SPECS[name] for role, name in MEMBERS[SYSTEM].items()}
    return open_replicas(crew, SYSTEM, specs, ran), ran


def _prompts(count: int) -> list[str]:
    rows = list(read_rows(ROOT / "pocket" / "data" / "test" / "gsm8k.jsonl"))
    return [str(rows[index % len(rows)]["question"]) for index in range(count)]


def _round(
    replicas: "Replicas", ran: "Sequence[Ran]", prompts: Sequence[str], tokens: int
) -> dict[str, float]:
    before = sum(each.processor for each in ran)
    wall, own = time.perf_counter(), time.process_time()
    done = replicas.generate(prompts, max_new_tokens=tokens, ignore_eos=True, batch_size=16)
    seconds = time.perf_counter() - wall
    count = sum(len(each.token_ids) for each in done)
    return {
        "tokens_per_second": round(count / seconds, 1),
        "processor_s_per_token": (sum(each.processor for each in ran) - before) / count,
        "driver_processor_s_per_completion": (time.process_time() - own) / len(done),
    }


def _call_seconds(replicas: "Replicas") -> float:
    """The median time of a call that does next to nothing."""
    times = []
    for _ in range(100):
        start = time.perf_counter()
        replicas.ask(0, "rows", 64, 16)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    guarded(main, again="")
