"""Log-probabilities of single tokens, and of the likeliest ones in their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOWEST = -9999.0  # written for minus infinity, which JSON does not have (vLLM does the same)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token, and the likeliest tokens in its place.

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
    """Rates one token at each position.

    Args:
        logits: [tokens, vocab], any float type.
        ids: the token at each position.
        top: how many of the likeliest tokens to list; -1 lists the whole vocabulary.
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
