"""Log-probabilities of chosen tokens and of prompts, as the protocol reports them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from proxytune.score import BLOCK_ENTRIES

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say (as in vLLM)


@dataclass(frozen=True)
class TokenLogprob:
    """One token under the distribution that it was chosen from, or stands behind.

    Attributes:
        id: the token.
        logprob: natural logarithm, before temperature, filters and logit_bias.
        rank: 1 for the likeliest token of the vocabulary.
        top: (id, logprob) of the likeliest tokens, best first.
    """

    id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def token_logprobs(logits: torch.Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Rates tokens.

    Args:
        logits: [tokens, vocab], any float type.
        ids: the token at each position.
        top: how many of the likeliest to list; -1 is the whole vocabulary.
    """
    log_probs = logits.float().log_softmax(-1).clamp_(min=LOWEST)
    chosen = log_probs.gather(-1, torch.tensor(ids, device=logits.device).unsqueeze(-1))
    ranks = (log_probs > chosen).sum(-1) + 1
    values, best = log_probs.topk(log_probs.shape[-1] if top < 0 else top)
    columns = ids, chosen.squeeze(-1).tolist(), ranks.tolist(), best.tolist(), values.tolist()
    return [
        TokenLogprob(token, logprob, rank, list(zip(listed, theirs, strict=True)))
        for token, logprob, rank, listed, theirs in zip(*columns, strict=True)
    ]


@torch.inference_mode()
def prompt_logprobs(
    system: Any, prompts: Sequence[Any], alphas: Sequence[float | None], tops: Sequence[int]
) -> list[list[TokenLogprob | None]]:
    """Rates the tokens of several prompts in one pass; None for the first token of each.

    Args:
        system: an idle `member.Member`.
        prompts: as its `prefill` takes them; members may differ in the first token alone.
        alphas: each prompt's own alpha; None is the system's.
        tops: for each prompt, how many of the likeliest tokens to list at every position.
    """
    rests = [_base(prompt)[1:] for prompt in prompts]
    rated: list[list[TokenLogprob | None]] = [[None] for _ in prompts]

    def rate(logits: torch.Tensor, at: int) -> None:
        for index, rest in enumerate(rests):
            here = rest[at : at + logits.shape[1]]
            if here:
                rated[index] += token_logprobs(logits[index, : len(here)], here, tops[index])

    own = {} if all(alpha is None for alpha in alphas) else {"alphas": list(alphas)}
    width = max(map(len, rests))
    block = max(16, BLOCK_ENTRIES // (len(prompts) * system.vocab_size))
    try:
        rate(system.prefill([_first(prompt) for prompt in prompts], **own).unsqueeze(1), 0)
        for start in range(0, width - 1, block):
            stop = min(start + block, width - 1)
            read = [rest[start:stop] for rest in rests]
            padded = [[*ids, *[0] * (stop - start - len(ids))] for ids in read]
            rate(system.extend(torch.tensor(padded)), start + 1)
        return rated
    finally:
        system.clear()


def same_tokens(ids: Mapping[str, Sequence[int]]) -> bool:
    """Whether all members read the same prompt, but for the first token (a BOS of their own)."""
    return len({tuple(each[1:]) for each in ids.values()}) == 1


def _base(prompt: Any) -> list[int]:
    return list(prompt["base"] if isinstance(prompt, Mapping) else prompt)


def _first(prompt: Any) -> Any:
    if isinstance(prompt, Mapping):
        return {role: ids[:1] for role, ids in prompt.items()}
    return prompt[:1]
