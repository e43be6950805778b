"""Formulas beside proxy-tuning's own (`proxytune.proxy.combine_logits`).

A formula is a pure function of the members' logits at one position. It takes them by role, and the
alphas, all as keywords: `formula(base=..., expert=..., antiexpert=..., alpha=...)`. Its parameters
name the members that it needs. Logits are [..., vocab] in any float type; it must not change them.
It returns the combined logits in float32: those of the distribution that tokens are chosen from.

A formula of one's own is such a function in any module (docs/formulas.md).
"""

import math
from collections.abc import Mapping
from functools import lru_cache, partial

import torch

from proxytune.errors import UserError
from proxytune.proxy import Formula, combine_logits, traits

Alpha = float | torch.Tensor  # a tensor where rows have alphas of their own, [rows, 1, ...]


@traits(adds=True, rises=True)
def sum_of_pairs(base: torch.Tensor, **others: torch.Tensor | float) -> torch.Tensor:
    """Proxy-tuning with several pairs: base + sum of alpha_i * (expert_i - antiexpert_i).

    One pair after the other, each as `combine_logits` (Liu et al. 2024, equation 1) does it.

    Args:
        base: logits of the large untuned model, [..., vocab].
        others: for each pair NAME the keywords NAME_expert, NAME_antiexpert and NAME_alpha.
    """
    names = [key.removesuffix("_alpha") for key in others if key.endswith("_alpha")]
    for name in names:
        expert, antiexpert = others[f"{name}_expert"], others[f"{name}_antiexpert"]
        assert isinstance(expert, torch.Tensor) and isinstance(antiexpert, torch.Tensor)
        base = combine_logits(base, expert, antiexpert, others[f"{name}_alpha"])
    return base


def dexperts(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: Alpha,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """DExperts (Liu et al. 2021): the base's filter, then the shift.

    Only tokens that the base alone would keep can be chosen.

    Args:
        base: the paper's z_t.
        expert: the paper's z_t^+.
        antiexpert: the paper's z_t^-.
        alpha: the paper's alpha.
        top_k: keeps so many tokens of the base; 0 keeps all.
        top_p: keeps the fewest tokens whose probabilities sum to so much.
    """
    if not (isinstance(top_k, int) and top_k >= 0 and 0 < top_p <= 1):
        raise UserError(
            f"dexperts: top_p={top_p!r} must be above 0 and at most 1, and top_k={top_k!r} a whole "
            "number, 0 or more"
        )
    kept = base.float()
    if top_k:
        lowest = kept.topk(min(top_k, kept.shape[-1])).values[..., -1:]
        kept = kept.masked_fill(kept < lowest, -torch.inf)
    if top_p < 1:
        values, ids = kept.sort(dim=-1, descending=True, stable=True)
        probs = values.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the mass before the token is enough
        kept = kept.masked_fill(torch.zeros_like(beyond).scatter_(-1, ids, beyond), -torch.inf)
    return combine_logits(kept, expert, antiexpert, alpha)


@traits(rises=True)
def contrastive(
    base: torch.Tensor, antiexpert: torch.Tensor, alpha: Alpha, *, plausibility: float = 0.1
) -> torch.Tensor:
    """Contrastive decoding (Li et al. 2023): log p_base - alpha * log p_antiexpert.

    Only tokens are allowed that the base gives at least the share `plausibility` of its likeliest
    token's probability.

    Args:
        base: the paper's large model ("expert").
        antiexpert: the paper's small model ("amateur").
        alpha: weight of the small model; 1 in the paper.
        plausibility: the paper's alpha.
    """
    if not 0 < plausibility <= 1:
        raise UserError(f"contrastive: plausibility must be above 0 and at most 1: {plausibility}")
    likely = base.float()
    likely = likely.masked_fill(likely < likely.amax(-1, True) + math.log(plausibility), -torch.inf)
    nothing = torch.zeros((), device=antiexpert.device).expand_as(antiexpert)
    return combine_logits(likely, nothing, antiexpert.float().log_softmax(-1), alpha)


@traits(gates=True)
def gated(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: Alpha,
    *,
    threshold: float,
) -> torch.Tensor:
    """Proxy-tuning only where the base is unsure (after Nudging, Fei et al. 2025).

    Args:
        base, expert, antiexpert, alpha: as in `combine_logits`.
        threshold: the paper's gamma: where the base's largest probability is below it, the shift
            is added; elsewhere the base's logits stay.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"gated: threshold must be a probability, not {threshold}")
    sure = base.float().softmax(-1).amax(-1, keepdim=True) >= threshold
    return torch.where(sure, base.float(), combine_logits(base, expert, antiexpert, alpha))


def guidance(base: torch.Tensor, antiexpert: torch.Tensor, alpha: Alpha) -> torch.Tensor:
    """One model under two prompts: base + alpha * (base - antiexpert).

    Context-aware decoding (Shi et al. 2024, their alpha) where the antiexpert's prompt lacks the
    context; classifier-free guidance (Sanchez et al. 2024, gamma = 1 + alpha) where it lacks the
    instruction.

    Args:
        base: logits under the whole prompt, [..., vocab].
        antiexpert: logits of the same weights under the other prompt.
        alpha: 0 is the base alone.
    """
    return combine_logits(base, base, antiexpert, alpha)


# The formulas that can be chosen by name, and their settings: those of conf/formula.
SHIPPED: Mapping[str, tuple[Formula, Mapping[str, float]]] = {
    "proxy": (combine_logits, {}),
    "dexperts": (dexperts, {"top_k": 0, "top_p": 0.9}),
    "gated": (gated, {"threshold": 0.4}),
    "contrastive": (contrastive, {"plausibility": 0.1}),
    "guidance": (guidance, {}),
}


def shipped(name: str, settings: Mapping[str, float] | None = None) -> Formula:
    """A formula of `SHIPPED`, with settings that may differ; equal ones are one object.

    Raises:
        UserError: there is no such formula, it has no such setting, or the setting is impossible.
    """
    if name not in SHIPPED:
        raise UserError(f"there is no formula {name!r}; there is {', '.join(SHIPPED)}")
    usual = SHIPPED[name][1]
    odd = next((key for key in settings or {} if key not in usual), None)
    if odd is not None:
        known = f"its settings are {', '.join(usual)}" if usual else "it has no settings"
        raise UserError(f"formula {name} has no {odd}; {known}")
    return _with_settings(name, tuple(sorted({**usual, **(settings or {})}.items())))


@lru_cache(maxsize=256)
def _with_settings(name: str, settings: tuple[tuple[str, float], ...]) -> Formula:
    formula, _ = SHIPPED[name]
    return partial(formula, **dict(settings)) if settings else formula
