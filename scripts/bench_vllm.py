"""Compares proxytune's own engine with vLLM, the same triple and workload: ratios of one run.

    python scripts/bench_vllm.py                             63M and twice 6.4M, on one CPU thread
    python scripts/bench_vllm.py --compiled                  the same, vLLM's models compiled
    python scripts/bench_vllm.py --size gpu --json out.json  13B and twice 7B in bfloat16, on a GPU
    python scripts/bench_vllm.py --size tiny --rounds 1      a check that the code works

It runs in vLLM's environment (docs/vllm.md). The models are random, and every contender writes the
same number of tokens, so the outputs are compared, too: in float32 they have to be equal. The base
alone stands for a directly tuned model, which has its size. Contenders run in turn, each in a
process of its own that loads once per round. On a CPU processor seconds are counted, on a GPU
seconds by the clock; loading, and with it compilation, is not. Beside the JSON file stands the same
as a table.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from proxytune.cli.guard import guarded
from proxytune.files import write_json

CONTENDERS = ("own", "vllm", "vllm_base", "own_base")
PAIRS = (("vllm", "vllm_base"), ("vllm", "own"), ("own", "vllm_base"), ("own_base", "vllm_base"))
ROLES = ("base", "expert", "antiexpert")
MARK = "MEASURED "


@dataclass(frozen=True)
class Shape:
    """A model's shape (hidden size, feed-forward size, layers, heads, key-value heads)."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Size:
    """A workload: a base, two helpers, and how many prompts of which lengths.

    Attributes:
        base: its shape.
        helper: the shape of expert and antiexpert.
        vocab: entries of the vocabulary.
        dtype: of all weights.
        prompts: how many.
        lengths: of the prompts, in tokens; drawn.
        outputs: the least and the most tokens of an output; drawn.
        rows: at once.
        threads: of a CPU; 0 leaves them as they are.
    """

    base: Shape
    helper: Shape
    vocab: int
    dtype: str
    prompts: int
    lengths: tuple[int, ...]
    outputs: tuple[int, int]
    rows: int
    threads: int

    def jobs(self) -> list[tuple[list[int], int]]:
        """Prompt ids and the number of tokens to write, the same in every process."""
        rng = random.Random(3)
        return [
            (
                [rng.randrange(3, self.vocab) for _ in range(rng.choice(self.lengths))],
                rng.randrange(self.outputs[0], self.outputs[1] + 1),
            )
            for _ in range(self.prompts)
        ]


_MIXED = (8, 16, 32, 64, 128, 256)
SIZES = {
    "tiny": Size(
        Shape(128, 256, 2, 4, 2), Shape(64, 128, 2, 2, 1), 512, "float32", 8, (8, 16), (4, 8), 4, 1
    ),
    "cpu": Size(
        Shape(768, 2048, 8, 12, 4),
        Shape(256, 704, 3, 4, 2),
        16384,
        "float32",
        64,
        _MIXED,
        (4, 96),
        16,
        1,
    ),
    "gpu": Size(
        Shape(5120, 13824, 40, 40, 40),
        Shape(4096, 11008, 32, 32, 32),
        32000,
        "bfloat16",
        128,
        _MIXED,
        (16, 256),
        32,
        0,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the contenders in turn and prints their times and ratios."""
    options = _parse(arguments)
    if options.contender:
        _measure(options, Path(options.models))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(options.models or folder)
        _make_models(SIZES[options.size], models)
        weights = {role: _weight_bytes(models / role) for role in ROLES}
        loads = [os.getloadavg()[0]]
        rounds = []
        for _ in range(options.rounds):
            turn = {}
            for each in options.only or CONTENDERS:
                turn[each] = _child(options, each, models)
                loads.append(os.getloadavg()[0])
                print(f"{each}: {turn[each]['seconds']:.1f}", flush=True)
            rounds.append(turn)
    noted = {"load_averages": loads, "compiled": options.compiled}
    report = _report(options.size, rounds, weights) | noted
    text = _markdown(report)
    print(text)
    if options.json:
        write_json(options.json, report)
        options.json.with_suffix(".md").write_text(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="of the contenders")
    parser.add_argument(
        "--compiled", action="store_true", help="engine.enforce_eager=false, which a GPU has anyway"
    )
    parser.add_argument("--models", help="a folder for the random models; kept, and used again")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _make_models(size: Size, folder: Path) -> None:
    """Writes the random models, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    for seed, role in enumerate(ROLES):
        if (folder / role / "config.json").exists():
            continue
        shape = size.base if role == "base" else size.helper
        config = LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.03 if role == "base" else 0.08,
            dtype=size.dtype,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
        model.save_pretrained(folder / role)
        _tokenizer(size.vocab).save_pretrained(folder / role)


def _tokenizer(vocab: int) -> Any:
    """A tokenizer whose words are the numbers of their ids; the workload is ids alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _child(options: argparse.Namespace, contender: str, models: Path) -> dict[str, Any]:
    """One contender in a process of its own."""
    given = ["--size", options.size, "--contender", contender, "--models", str(models)]
    given += ["--compiled"] if options.compiled else []
    one_thread = {"OMP_NUM_THREADS": "1"} if SIZES[options.size].threads == 1 else {}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = os.environ | quiet | one_thread
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(
        [sys.executable, __file__, *given], env=environment, stdout=subprocess.PIPE, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{contender} failed: {done.stdout[-2000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


def _measure(options: argparse.Namespace, models: Path) -> None:
    """Loads a contender, runs a part of the workload and then all of it, and prints its time."""
    import torch

    size = SIZES[options.size]
    if size.threads:
        torch.set_num_threads(size.threads)
    generator = _load(size, options.contender, models, options.compiled)
    on_cpu = not torch.cuda.is_available()
    clock = time.process_time if on_cpu else time.perf_counter
    _run(generator, size.jobs()[: size.rows], size.rows)  # warms up
    start = clock()
    outputs = _run(generator, size.jobs(), size.rows)
    found = {
        "seconds": clock() - start,
        "unit": "processor seconds" if on_cpu else "seconds",
        "outputs": outputs,
    }
    print(MARK + json.dumps(found), flush=True)


def _load(size: Size, contender: str, models: Path, compiled: bool) -> Any:
    import proxytune

    roles = ("base",) if contender.endswith("_base") else ROLES
    specs: dict[str, Any] = {
        role: proxytune.ModelSpec(str(models / role), dtype=size.dtype) for role in roles
    }
    if contender.startswith("own"):
        return proxytune.load(**specs)
    from proxytune.vllm.pool import load_engine
    from proxytune.vllm.settings import EngineSettings

    options: dict[str, Any] = {"max_num_seqs": size.rows, "enable_prefix_caching": False}
    eager = False if compiled else None  # None is what `engine=vllm` does unless told otherwise
    settings = EngineSettings(name="vllm", max_model_len=512, enforce_eager=eager, options=options)
    return load_engine(specs, settings)


def _run(generator: Any, jobs: list[tuple[list[int], int]], rows: int) -> list[list[int]]:
    """Every prompt with its own number of tokens; their outputs, in order."""
    from dataclasses import replace

    from proxytune.records import make_decoding

    decoding = make_decoding(max_new_tokens=1, ignore_eos=True)
    made = generator.requests([prompt for prompt, _ in jobs], decoding)
    requests = [
        replace(request, max_new_tokens=count, tokenizer=None)
        for request, (_, count) in zip(made, jobs, strict=True)
    ]
    outputs: list[list[int]] = [[] for _ in jobs]
    for finished in generator.loop(rows).run(requests):
        outputs[finished.index] = finished.token_ids
    return outputs


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _report(
    name: str, rounds: Sequence[dict[str, dict[str, Any]]], weights: dict[str, int]
) -> dict[str, Any]:
    """Times, ratios, and whether the outputs agree, as JSON."""
    from proxytune import provenance
    from proxytune.vllm.settings import installed

    size = SIZES[name]
    seconds = {each: [turn[each]["seconds"] for turn in rounds] for each in rounds[0]}
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": name,
        "workload": asdict(size),
        "unit": next(iter(rounds[0].values()))["unit"],
        "seconds": seconds,
        "tokens": sum(count for _, count in size.jobs()),
        "helpers_share": sum(weights[role] for role in ROLES[1:]) / weights["base"],
        "vllm": installed(),
        **provenance.environment(),
    }
    report["ratios"] = {
        f"{a}_over_{b}": median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for a, b in PAIRS
        if a in seconds and b in seconds
    }
    report["equal_outputs"] = {
        f"{a}_and_{b}": sum(map(list.__eq__, rounds[0][a]["outputs"], rounds[0][b]["outputs"]))
        for a, b in (("own", "vllm"), ("own_base", "vllm_base"))
        if a in seconds and b in seconds
    }
    return report


def _markdown(report: dict[str, Any]) -> str:
    """The report as tables; each ratio with the bar that it should pass."""
    hardware, versions = report["hardware"], report["versions"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    loads = f"{min(report['load_averages']):.1f} to {max(report['load_averages']):.1f}"
    share = report["helpers_share"]
    bars = {
        "vllm_over_vllm_base": f"at most {1.15 * (1 + share):.2f}",
        "vllm_over_own": "below 0.75",
    }
    prompts = report["workload"]["prompts"]
    compiled = ", its models compiled" if report["compiled"] else ""
    lines = [
        f"{where}, size {report['size']}, {report['workload']['dtype']}, {prompts} prompts, "
        f"{report['tokens']} tokens, {report['workload']['rows']} rows, helpers' share of the "
        f"weights {share:.2f}, load average {loads}, {report['date']}; vLLM "
        f"{report['vllm']}{compiled}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}.",
        "",
        f"| contender | {report['unit']}, by round |",
        "|---|---|",
    ]
    for each, times in report["seconds"].items():
        lines.append(f"| {each} | {' / '.join(f'{seconds:.1f}' for seconds in times)} |")
    lines += ["", "| ratio (median of the rounds) | measured | bar |", "|---|---|---|"]
    for name, value in report["ratios"].items():
        lines.append(f"| {name} | {value:.3f} | {bars.get(name, '')} |")
    for pair, count in report["equal_outputs"].items():
        lines.append(f"| equal outputs of {pair} | {count} of {prompts} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    guarded(main, again="")
