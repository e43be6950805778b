"""What a GPU shows, in one command of at most ten minutes: `make gpu`.

    python scripts/gpu.py                 on the first GPU; results/bench/gpu
    python scripts/gpu.py --size tiny     a check that the script works, on a CPU

It needs torch, transformers and numpy, no network and no checkpoints: tiny random families are
compared with the CPU's answers (float32) and with themselves (bfloat16), with and without CUDA
graphs and drafts; then scripts/bench.py runs at 13B and 7B shapes, part by part. Every part has a
process of its own and a limit of time, so one that fails or hangs leaves the others their figures.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import ROOT, write_json

# part -> seconds that it may take; together at most ten minutes
PARTS = {"exact": 80, "decode": 140, "memory": 60, "mixed": 120, "speculative": 150}
# What scripts/bench.py gets beside its size, so that a part ends within its time.
SMALLER = {"mixed": ["--scale", "0.06"], "speculative": ["--acceptance", "0.8"]}
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gemma3")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts and writes gpu.json and gpu.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "gpu"), default="gpu")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench" / "gpu")
    parser.add_argument("--exact", help=argparse.SUPPRESS)  # the device; in a child process
    options = parser.parse_args(arguments)
    if options.exact:
        print(json.dumps(_exact(options.exact)))
        return
    import torch

    if options.size == "gpu" and not torch.cuda.is_available():
        raise UserError("no GPU was found; --size tiny checks the script on a CPU")
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if options.size == "gpu" else "CPU"
    written = options.output / "gpu.json"
    report: dict[str, Any] = {"parts": {}}
    if options.only and written.exists():  # the other parts stay
        report = json.loads(written.read_text())
    for part in options.only or PARTS:
        report["parts"][part] = {"device": device, **_part(part, options.size, options.output)}
        write_json(written, report)
        print(f"{part}: {report['parts'][part]['state']}", flush=True)
    table = _table(report, options.output)
    (options.output / "gpu.md").write_text(table)
    print(table)


def _part(part: str, size: str, output: Path) -> dict[str, Any]:
    """One part in a process of its own: its state, its seconds, and what it measured."""
    script, start = Path(__file__), time.monotonic()
    found = output / f"{part}.json"
    found.unlink(missing_ok=True)
    if part == "exact":
        given = [str(script), "--exact", "cuda:0" if size == "gpu" else "cpu"]
    else:
        given = [str(script.with_name("bench.py")), "--size", size, "--only", part]
        given += ["--rounds", "1", "--json", str(found), *SMALLER.get(part, [])]
    try:
        done = subprocess.run(
            [sys.executable, *given], capture_output=True, text=True, timeout=PARTS[part]
        )
    except subprocess.TimeoutExpired:
        return {"state": f"not finished in {PARTS[part]} seconds"}
    seconds = round(time.monotonic() - start, 1)
    if done.returncode:
        return {"state": f"failed: {done.stderr.strip()[-1500:]}", "seconds": seconds}
    measured = json.loads(found.read_text() if part != "exact" else done.stdout.splitlines()[-1])
    return {"state": "done", "seconds": seconds, "measured": measured}


def _exact(device: str) -> dict[str, str]:
    """Family and dtype -> "" where every way to decode on the device writes the same."""
    return {
        f"{family}, {dtype}": _differences(family, dtype, device)
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
    }


def _differences(family: str, dtype: str, device: str) -> str:
    """The ways to decode a triple of one family whose text is not that of lockstep.

    In float32, lockstep is compared with the CPU's text, too. In bfloat16 the rounding of a wider
    block may turn a choice that is nearly even, so there the count says how many rows differ.
    """
    import torch

    sys.path.insert(0, str(ROOT))
    import proxytune
    from tests.tiny import tiny_model

    def texts(place: str, graphs: bool = False, speculative: bool | int = False) -> list[Any]:
        members = [
            tiny_model(family, seed=seed, dtype=getattr(torch, dtype)).to(place)  # pyright: ignore[reportArgumentType]
            for seed in range(3)
        ]
        for member in members:
            member.config._name_or_path = ""
        base, expert, antiexpert = members
        generator = proxytune.load(base, expert, antiexpert, cuda_graphs=graphs)
        prompts = [[1, 5 + row, 9, 3 + 2 * row] for row in range(12)]
        found = generator.generate(prompts, max_new_tokens=24, speculative=speculative)
        return [each.token_ids for each in found]

    lockstep = texts(device)
    ways = {"drafts of 3": texts(device, speculative=3)}
    if device.startswith("cuda"):
        ways["CUDA graphs"] = texts(device, graphs=True)
    if dtype == "float32":
        ways["the CPU"] = texts("cpu")
    counts = {
        way: sum(a != b for a, b in zip(got, lockstep, strict=True)) for way, got in ways.items()
    }
    return ", ".join(f"{way}: {n} of 12 rows differ" for way, n in counts.items() if n)


def _table(report: dict[str, Any], output: Path) -> str:
    """The report as Markdown: parts and their states, then the table of each benchmark."""
    lines = ["| part | device | state | seconds |", "|---|---|---|---|"]
    tables: list[str] = []
    for name, part in report["parts"].items():
        state = part["state"].splitlines()[-1]
        if name == "exact" and "measured" in part:
            wrong = [f"{case}: {why}" for case, why in part["measured"].items() if why]
            state = "; ".join(wrong) or f"all {len(part['measured'])} families and dtypes agree"
        elif "measured" in part:
            tables += ["", f"## {name}", "", (output / f"{name}.md").read_text().rstrip()]
        lines.append(f"| {name} | {part['device']} | {state} | {part.get('seconds', '')} |")
    return "\n".join(lines + tables) + "\n"


if __name__ == "__main__":
    try:
        from proxytune.cli.guard import guarded
    except ModuleNotFoundError:  # a machine with torch, transformers and numpy alone
        main()
    else:
        guarded(main, again="")
