"""Pretrains one model of the pocket family from random weights.

    python -m scripts.pocket.pretrain --size large --out build/pocket/base
    python -m scripts.pocket.pretrain --size small --out build/pocket/antiexpert

Both sizes read the same tokens in the same order. Every few hundred steps the model is saved and
probed: how many facts, truths, units and held-out problems does it complete correctly, asked in the
form of the pretraining text? The sizes were chosen by these probes, before any tuning.

The large model's matrices are trained with Muon (Jordan et al. 2024), which learns the same facts
in half of AdamW's steps. Everything is float32 on one thread, so the same machine gives the same
weights again, bit for bit.
"""

import argparse
import ctypes
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.pocket import text, world
from scripts.pocket.tokenizer import SPECIAL, make_tokenizer

BATCH, LENGTH = 32, 128  # sequences per step, tokens per sequence
STEPS = 2000


@dataclass(frozen=True)
class Size:
    """A model size with the learning rates that suit it.

    Attributes:
        width: of the residual stream.
        layers: transformer blocks.
        heads: attention heads, of `HEAD` dimensions each.
        mlp: width inside the feed-forward blocks.
        peak: AdamW's learning rate after warm-up.
        muon: Muon's, for the matrices inside the blocks; None trains them with AdamW, too.
        spread: standard deviation of the random weights; at 0.02 the small one learns late.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    peak: float
    muon: float | None = None
    spread: float = 0.02


HEAD = 32  # the smallest head that serving engines take on a CPU
SIZES = {"large": Size(128, 4, 4, 256, 4e-3, 0.02), "small": Size(32, 3, 2, 64, 5e-3, spread=0.1)}


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights (fixed seed) for the tokenizer's vocabulary."""
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            head_dim=HEAD,
            initializer_range=size.spread,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index("<pad>"),
            bos_token_id=SPECIAL.index("<s>"),
            eos_token_id=SPECIAL.index("</s>"),
        )
    )


class Stream:
    """The endless pretraining stream, as batches of token ids [BATCH, LENGTH]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int = 5) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._ids: list[int] = []

    def next(self) -> Tensor:
        """The next batch of consecutive documents, each between <s> and </s>."""
        need = BATCH * LENGTH
        while len(self._ids) < need:
            self._ids += self._tokenizer.encode(text.document(self._rng) + "</s>")
        batch, self._ids = self._ids[:need], self._ids[need:]
        return torch.tensor(batch).view(BATCH, LENGTH)

    def state(self) -> tuple[object, list[int]]:
        """What `go_on` takes: the generator's state, and the ids that wait for the next batch."""
        return self._rng.getstate(), list(self._ids)

    def go_on(self, state: tuple[Any, list[int]]) -> None:
        """Goes on after the batch after which `state` was taken."""
        generator, self._ids = state
        self._rng.setstate(generator)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, flat to half of them, then linear decay to 2 % of the peak."""
    decay = max(0.02, (steps - step) / (0.5 * steps)) if step > 0.5 * steps else 1.0
    return peak * min(1.0, (step + 1) / 50) * decay


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, for matrices (Jordan et al. 2024).

    torch.optim.Muon computes in bfloat16, which many CPUs emulate, and one matrix at a time; here
    matrices of the same shape are one batch in float32.
    """

    # Newton-Schulz coefficients of the reference implementation, github.com/KellerJordan/Muon
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": 0.01})
        self._alike: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self._alike.setdefault(matrix.shape, []).append(matrix)
            self.state[matrix]["mean"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (no closure)
        """One step down the momentum's orthogonal factor."""
        [group] = self.param_groups
        rate, momentum = group["lr"], group["momentum"]
        for (rows, columns), matrices in self._alike.items():
            means = [self.state[matrix]["mean"] for matrix in matrices]
            for matrix, mean in zip(matrices, means, strict=True):
                assert matrix.grad is not None
                mean.lerp_(matrix.grad, 1 - momentum)
            looked_ahead = [
                matrix.grad.lerp(mean, momentum)  # pyright: ignore[reportOptionalMemberAccess]
                for matrix, mean in zip(matrices, means, strict=True)
            ]
            updates = self._orthogonal(torch.stack(looked_ahead))
            scale = max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * scale)

    def _orthogonal(self, stack: Tensor) -> Tensor:
        """Nearly orthogonal matrices with the same singular vectors [n, rows, columns]."""
        a, b, c = self.COEFFICIENTS
        tall = stack.shape[-2] > stack.shape[-1]
        x = stack.mT if tall else stack
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if tall else x


def optimizers(model: LlamaForCausalLM, size: Size) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the blocks where the size has it."""
    named = dict(model.named_parameters())
    vectors = [p for p in named.values() if p.dim() == 1]
    matrices = [p for p in named.values() if p.dim() > 1]
    inner = [p for name, p in named.items() if p.dim() > 1 and "embed" not in name]
    if size.muon is not None:
        matrices = [p for p in matrices if all(p is not each for each in inner)]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=size.peak, betas=(0.9, 0.98), fused=True)
    return [adam] if size.muon is None else [adam, Muon(inner, lr=size.muon)]


Case = tuple[str, str]  # what the model reads, and what it should go on with


def cases() -> dict[str, list[Case]]:
    """Kind of knowledge or skill -> what is asked in a probe."""
    rng = random.Random(3)
    problems = [world.make_problem(rng, "dev") for _ in range(100)]
    functions = [world.sum_function(rng, "dev") for _ in range(100)]
    lands = [(land, r) for land in world.LANDS[::12] for r in world.RELATIONS]
    herbs = [(herb, s) for herb in world.HERBS[::3] for s in world.SEASONS]
    units = [world.unit_function(u, m, 7) for u in world.UNITS[::2] for m in world.MEASURES]
    return {
        "facts": [(f"The {r} of {land} is", f" {world.FACTS[land, r]}") for land, r in lands],
        "asked": [(world.land_question(*key), f" {world.FACTS[key]}") for key in lands],
        "truths": [(world.brings(key, "").rstrip(), f" {world.TRUTHS[key]}") for key in herbs],
        "factors": [(f"{f.head}    return x", f.body.removeprefix("    return x")) for f in units],
        "sums": [
            (f"{f.head}    return (x", f.body.removeprefix("    return (x")) for f in functions
        ],
        "math": [
            (f"{world.math_prompt(p)} First", _rest(world.worked(p), "First")) for p in problems
        ],
        "thoughts": [
            (
                f"{world.math_prompt(p).removesuffix(' Answer:')} <think>",
                _rest(world.thought(p), "<think>"),
            )
            for p in problems
        ],
        "options": [
            _options(f"The {r} of {land}:", world.FACTS[land, r], world.VALUES, rng)
            for land, r in lands
        ],
    }


def _rest(answer: str, begun: str) -> str:
    return answer.removeprefix(begun)


def _options(cue: str, right: str, names: Sequence[str], rng: random.Random) -> Case:
    """Which of four options answers the cue?"""
    wrong = rng.sample([name for name in names if name != right], 3)
    return f"{world.listed(world.options_of(right, wrong, rng))}\n{cue}", f" {right}"


@torch.inference_mode()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Kind of knowledge or skill -> percent of cases that the model completes correctly."""
    return {
        kind: 100 * sum(_predicts(model, tokenizer, *case) for case in asked) / len(asked)
        for kind, asked in cases().items()
    }


def _predicts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, rest: str
) -> bool:
    """Whether every token of `rest` is the model's first choice after `prompt`."""
    head = len(tokenizer.encode(prompt))
    ids = torch.tensor([tokenizer.encode(prompt + rest)])
    best = model(input_ids=ids).logits[0, head - 1 : -1].argmax(-1)
    return bool(torch.equal(best, ids[0, head:]))


@dataclass(frozen=True)
class Checkpoint:
    """All that a training goes on from, so that one which was stopped ends with the same weights.

    Attributes:
        path: the file.
        model: the model in training.
        optimizers: its optimisers.
        stream: what it reads.
    """

    path: Path
    model: LlamaForCausalLM
    optimizers: Sequence[torch.optim.Optimizer]
    stream: Stream

    def store(self, step: int) -> None:
        """Writes the state after a number of steps; a stop meanwhile leaves the older file."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "stream": self.stream.state(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def restore(self) -> int:
        """Takes the file's state, if there is one; returns the steps that are done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=False)  # a file of our own
        self.model.load_state_dict(state["model"])
        for each, values in zip(self.optimizers, state["optimizers"], strict=True):
            rates = [group["lr"] for group in each.param_groups]
            each.load_state_dict(values)
            for group, rate in zip(each.param_groups, rates, strict=True):
                group["lr"] = rate
        self.stream.go_on(state["stream"])
        return state["step"]


def train(size: Size, steps: int, out: Path, every: int = 250) -> None:
    """Trains a model and saves it with its tokenizer in `out`, at checkpoints and at the end."""
    tokenizer = make_tokenizer()
    stream, model = Stream(tokenizer), make_model(size, tokenizer)
    parameters = list(model.parameters())
    print(f"{size} {sum(p.numel() for p in parameters)} parameters", flush=True)
    used = optimizers(model, size)
    kept = Checkpoint(out / "checkpoint.pt", model, used, stream)
    first, began = kept.restore(), time.monotonic()
    groups = [(group, group["lr"]) for each in used for group in each.param_groups]
    for step in range(first, steps):
        for group, peak in groups:
            group["lr"] = rate_at(step, steps, peak)
        ids = stream.next()
        logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for each in used:
            each.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            kept.store(step + 1)
            rate = (step + 1 - first) * BATCH * LENGTH / (time.monotonic() - began)
            shares = {k: round(v) for k, v in probe(model, tokenizer).items()}
            print(f"{step + 1} loss {loss.item():.3f} {rate:.0f} tokens/s {shares}", flush=True)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: returning 35 MB of logits each step takes half the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of 4,096 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    train(SIZES[args.size], args.steps, args.out)


if __name__ == "__main__":
    main()
