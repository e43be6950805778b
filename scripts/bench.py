"""Measures the decode engine: ratios of times from one run, with hardware and versions.

    python scripts/bench.py                        everything, at the machine's size
    python scripts/bench.py --only decode --only memory --json out.json
    python scripts/bench.py --size tiny            a check that the code works, in seconds

docs/performance.md describes the measurements and the figures.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import write_json

# as in bench_cases, which imports torch: what --help says should not wait for it
ONLY = ("decode", "mixed", "speculative", "table12", "memory", "pocket", "parts")
SIZES = ("tiny", "cpu", "gpu")
RATIOS = (
    "lockstep_over_sum",
    "lockstep_over_largest",
    "cuda_graphs_over_lockstep",
    "mixed_speedup",
    "mixed_over_generate_of_base",
    "mixed_share_of_bound",
    "speculative_acceptance",
    "speculative_cost_ratio",
    "speculative_speedup",
    "speculative_speedup_at_batch_8",
    "speculative_over_tuned",
    "lockstep_over_tuned",
    "table12_proxy_over_tuned",
    "table12_paper",
    "peak_memory_over_sum",
    "pocket_acceptance",
    "gain_of_packed_passes",
    "gain_of_narrow_products",
    "gain_of_adapted_drafts",
    "gain_of_probing",
)
BARS = {
    ("lockstep_over_sum", ""): "at most 1.10 (1.05 on a GPU)",
    ("mixed_share_of_bound", ""): "at least 0.85",
    ("speculative_speedup", "0.3"): "at least 0.95",
    ("speculative_speedup", "0.8"): "at least 2",
    ("speculative_over_tuned", "0.8"): "below 1",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen benchmarks, prints their ratios, and writes the JSON file."""
    options = _parse(arguments)
    import torch
    import transformers
    from bench_cases import CASES, SIZES

    from proxytune import provenance

    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.size = options.size or ("gpu" if torch.cuda.is_available() else "cpu")
    size = SIZES[options.size]
    if options.clock == "cpu" and (size.device != "cpu" or options.threads != 1):
        raise UserError("--clock cpu needs a CPU size and --threads 1")
    if options.scale:
        size = replace(size, scale=options.scale)
    if options.acceptance:
        size = replace(size, acceptances=tuple(options.acceptance))
    if options.clock == "cpu":
        # The engine must choose its blocks by the same clock that measures it.
        time.perf_counter = time.process_time
        size = replace(size, clock=time.process_time)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": options.size,
        "rounds": options.rounds,
        "clock": options.clock,
        "scale": size.scale,
        "shapes": {
            "decode, memory": [vars(size.base), vars(size.small)],
            "speculative": [vars(shape) for shape in size.draft_pair],
            "mixed": [vars(size.mixed_base), vars(size.mixed_small)],
            "table12": [vars(shape) for shape in size.pair],
        },
        "dtype": str(size.dtype).removeprefix("torch."),
        "load_average": os.getloadavg()[0],
        **provenance.environment(),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or CASES:
        print(f"{name} ...", flush=True)
        results = CASES[name](size, options.rounds)
        for key, value in results.items():
            _show(key, value)
        report |= results
        if options.json:  # after each case, so that an interrupted run keeps the finished ones
            write_json(options.json, report)
            options.json.with_suffix(".md").write_text(markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The ratios of a report as a table, each with the bar that it should pass."""
    hardware = report["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    lines = [
        f"{where}, {hardware['torch_threads']} torch thread(s), {report['dtype']}, size "
        f"{report['size']}, median of {report['rounds']} rounds, load average "
        f"{report['load_average']:.1f}, {report['clock']} clock, "
        f"mixed lengths times {report['scale']}, {report['date']}; "
        f"torch {report['versions']['torch']}, transformers {report['versions']['transformers']}.",
        "",
        "| ratio | case | measured | bar |",
        "|---|---|---|---|",
    ]
    for key, value in report.items():
        if key not in RATIOS:
            continue
        cases = value if isinstance(value, Mapping) else {"": value}
        for case, ratio in cases.items():
            bar = BARS.get((key, case)) or BARS.get((key, "")) or ""
            lines.append(f"| {key} | {case} | {ratio:.3f} | {bar} |")
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=ONLY, help="may be repeated")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--size", choices=SIZES, help="default: the machine's")
    parser.add_argument("--rounds", type=int, default=3, help="each ratio is their median")
    parser.add_argument("--scale", type=float, help="of the lengths of the mixed workloads")
    parser.add_argument(
        "--acceptance", action="append", type=float, help="of drafts; may be repeated"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu is this process's processor time: with --threads 1, for a busy machine",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    return options


def _show(key: str, value: Any, indent: str = "  ") -> None:
    if isinstance(value, Mapping):
        print(f"{indent}{key}")
        for name, inner in value.items():
            _show(str(name), inner, indent + "  ")
    else:
        text = f"{value:.3f}" if isinstance(value, float) else json.dumps(value)
        print(f"{indent}{key:<28} {text}", flush=True)


if __name__ == "__main__":
    try:
        from proxytune.cli.guard import guarded
    except ModuleNotFoundError:  # a machine with torch, transformers and numpy alone
        main()
    else:
        guarded(main, again="with --json, what was measured is kept")
    sys.exit(0)
