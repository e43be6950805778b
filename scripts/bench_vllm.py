"""Compares proxytune's own engine with vLLM, the same triple and workload: ratios of one run.

    python scripts/bench_vllm.py                             63M and twice 6.4M, on one CPU thread
    python scripts/bench_vllm.py --size gpu --json out.json  13B and twice 7B in bfloat16, on a GPU
    python scripts/bench_vllm.py --size tiny --rounds 1      a check that the code works

It runs in vLLM's environment (docs/vllm.md). The models are random, and every contender writes the
same number of tokens, so the outputs are compared, too: in float32 they have to be equal.
Contenders run in turn, each in a process of its own that loads once per round. On a CPU processor
seconds are counted, on a GPU seconds by the clock.
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
from pathlib import Path
from statistics import median
from typing import Any

from proxytune.cli.guard import guarded
from proxytune.files import write_json

CONTENDERS = ("own", "vllm", "vllm_base", "vllm_tuned")
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
        base: its shape; the tuned model that vLLM runs alone has it, too.
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
        _measure(SIZES[options.size], options.contender, Path(options.models))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(options.models or folder)
        _make_models(SIZES[options.size], models)
        rounds = [
            {each: _child(options.size, each, models) for each in options.only or CONTENDERS}
            for _ in range(options.rounds)
        ]
    report = _report(options.size, rounds)
    print("\n".join(_lines(report)))
    if options.json:
        write_json(Path(options.json), report)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="of the contenders")
    parser.add_argument("--models", help="a folder for the random models; kept, and used again")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _make_models(size: Size, folder: Path) -> None:
    """Writes the random models, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    for seed, role in enumerate(("base", "expert", "antiexpert")):
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


def _child(size: str, contender: str, models: Path) -> dict[str, Any]:
    """One contender in a process of its own."""
    given = ["--size", size, "--contender", contender, "--models", str(models)]
    one_thread = {"OMP_NUM_THREADS": "1"} if SIZES[size].threads == 1 else {}
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


def _measure(size: Size, contender: str, models: Path) -> None:
    """Loads a contender, runs the workload twice, and prints the second run's time."""
    import torch

    if size.threads:
        torch.set_num_threads(size.threads)
    generator = _load(size, contender, models)
    on_cpu = not torch.cuda.is_available()
    clock = time.process_time if on_cpu else time.perf_counter
    outputs: list[list[int]] = []
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = clock()
        outputs = _run(size, generator)
        seconds = clock() - start
    unit = "processor seconds" if on_cpu else "seconds"
    print(MARK + json.dumps({"seconds": seconds, "unit": unit, "outputs": outputs}), flush=True)


def _load(size: Size, contender: str, models: Path) -> Any:
    import proxytune

    roles = ("base", "expert", "antiexpert") if contender in ("own", "vllm") else ("base",)
    specs: dict[str, Any] = {
        role: proxytune.ModelSpec(str(models / role), dtype=size.dtype) for role in roles
    }
    if contender == "own":
        return proxytune.load(specs["base"], specs["expert"], specs["antiexpert"])
    from proxytune.vllm.pool import load_engine
    from proxytune.vllm.settings import EngineSettings

    options: dict[str, Any] = {"max_num_seqs": size.rows, "enable_prefix_caching": False}
    return load_engine(specs, EngineSettings(name="vllm", max_model_len=512, options=options))


def _run(size: Size, generator: Any) -> list[list[int]]:
    """The workload: every prompt with its own number of tokens."""
    from dataclasses import replace

    from proxytune.records import make_decoding

    jobs = size.jobs()
    decoding = make_decoding(max_new_tokens=1, ignore_eos=True)
    made = generator.requests([prompt for prompt, _ in jobs], decoding)
    requests = [
        replace(request, max_new_tokens=count, tokenizer=None)
        for request, (_, count) in zip(made, jobs, strict=True)
    ]
    outputs: list[list[int]] = [[] for _ in jobs]
    for finished in generator.loop(size.rows).run(requests):
        outputs[finished.index] = finished.token_ids
    return outputs


def _report(name: str, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Times, ratios and whether the outputs agree, as JSON."""
    from proxytune import provenance

    size = SIZES[name]
    seconds = {each: [turn[each]["seconds"] for turn in rounds] for each in rounds[0]}
    middle = {each: median(times) for each, times in seconds.items()}
    report: dict[str, Any] = {
        "size": name,
        "workload": asdict(size),
        "unit": next(iter(rounds[0].values()))["unit"],
        "seconds": seconds,
        "tokens": sum(count for _, count in size.jobs()),
        "environment": provenance.environment(),
    }
    pairs = (("vllm", "own"), ("vllm", "vllm_base"), ("vllm", "vllm_tuned"), ("own", "vllm_base"))
    report["ratios"] = {
        f"{a}_over_{b}": round(middle[a] / middle[b], 3)
        for a, b in pairs
        if a in middle and b in middle
    }
    if {"own", "vllm"} <= rounds[0].keys():
        both = zip(rounds[0]["own"]["outputs"], rounds[0]["vllm"]["outputs"], strict=True)
        report["equal_outputs"] = sum(own == theirs for own, theirs in both)
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    lines = [f"{report['size']}: {report['tokens']} tokens, {report['unit']}"]
    for each, times in report["seconds"].items():
        lines.append(f"  {each:11} {' / '.join(f'{seconds:.1f}' for seconds in times)}")
    lines += [f"  {name} {value}" for name, value in report["ratios"].items()]
    if "equal_outputs" in report:
        lines.append(
            f"  equal outputs: {report['equal_outputs']} of {SIZES[report['size']].prompts}"
        )
    return lines


if __name__ == "__main__":
    guarded(main, again="")
