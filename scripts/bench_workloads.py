"""Plain decoding loops to compare the engine with, workloads, and fair timing."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from proxytune.errors import UserError


@dataclass(frozen=True)
class Workload:
    """Prompts in arrival order, and the number of tokens that each is continued by.

    Attributes:
        prompts: token ids per prompt.
        lengths: generated tokens per prompt, as if an end-of-sequence token came then.
    """

    prompts: list[list[int]]
    lengths: list[int]

    def equalized(self, batch: int) -> "Workload":
        """As many prompt and generated tokens, spread evenly over full batches: no padding."""
        rows = -(-len(self.prompts) // batch) * batch
        prompt = -(-sum(map(len, self.prompts)) // rows)
        length = -(-sum(self.lengths) // rows)
        return Workload([self.prompts[0][:1] * prompt] * rows, [length] * rows)


def workload(kind: str, rows: int, vocab: int, scale: float = 1.0) -> Workload:
    """A mixed workload: prompts of 8 to 512 tokens, and outputs of very different lengths.

    Args:
        kind: "uniform" (outputs of 1 to 256 tokens) or "heavy_tailed" (log-normal with median 60
            and sigma 1.3, cut at 1,024).
        rows: prompts.
        vocab: token ids are below this number.
        scale: factor on all lengths; below 1 for a quick look.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(low: int, high: int) -> list[int]:
        high = max(low, round(high * scale))
        return torch.randint(low, high + 1, (rows,), generator=generator).tolist()

    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in uniform(8, 512)]
    if kind == "uniform":
        return Workload(prompts, uniform(1, 256))
    if kind != "heavy_tailed":
        raise UserError(f"a workload is uniform or heavy_tailed, not {kind}")
    drawn = 60 * torch.exp(1.3 * torch.randn(rows, generator=generator))
    lengths = (drawn.clamp(1, 1024) * scale).round().clamp(min=1).int().tolist()
    return Workload(prompts, lengths)


@torch.inference_mode()
def lockstep(
    models: Sequence[PreTrainedModel], prompts: Sequence[Sequence[int]], new_tokens: int
) -> torch.Tensor:
    """Proxy-tuning in its simplest form: a padded batch, three forward passes per token, greedy.

    Args:
        models: base, expert, antiexpert; or one model alone.
        prompts: token ids.
        new_tokens: for every row.

    Returns:
        [rows, new_tokens]
    """
    device = models[0].device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [DynamicCache(config=model.config) for model in models]
    written = []
    for _ in range(new_tokens):
        logits = [
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            for model, cache in zip(models, caches, strict=True)
        ]
        total = logits[0] if len(models) == 1 else logits[0] + (logits[1] - logits[2])
        ids = total.argmax(-1, keepdim=True)
        written.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, dim=1)


def static_batches(models: Sequence[PreTrainedModel], work: Workload, batch: int) -> None:
    """`lockstep` over batches in arrival order; each waits for its longest row."""
    for start in range(0, len(work.prompts), batch):
        longest = max(work.lengths[start : start + batch])
        lockstep(models, work.prompts[start : start + batch], longest)


@torch.inference_mode()
def bare_forwards(model: PreTrainedModel, rows: int, prompt: int, steps: int) -> None:
    """One model reads a prompt and then single tokens, and nothing else: the cost of its passes."""
    cache = DynamicCache(config=model.config)
    ids = torch.ones(rows, prompt, dtype=torch.long, device=model.device)
    for _ in range(steps):
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        ids = ids[:, :1]


@torch.inference_mode()
def plain_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> None:
    """transformers' own `generate`, greedy, left-padded."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    model.generate(  # pyright: ignore[reportCallIssue]
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=settings,
    )


def generate_batches(model: PreTrainedModel, work: Workload, batch: int) -> None:
    """`plain_generate` over batches in arrival order."""
    for start in range(0, len(work.prompts), batch):
        longest = max(work.lengths[start : start + batch])
        plain_generate(model, work.prompts[start : start + batch], longest)


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call by `clock`, with the GPU's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def interleaved(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run in every round. Runs alternate (A B C A B C): noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
    return times


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
