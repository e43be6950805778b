"""Formulas beside proxy-tuning's own (`proxytune.proxy.combine_logits`).

A formula is a pure function of the members' logits at one position. It takes them by role, and the
alphas, all as keywords: `formula(base=..., expert=..., antiexpert=..., alpha=...)`. Its parameters
name the members that it needs. Logits are [..., vocab] in any float type; it must not change them.
It returns the combined logits in float32: those of the distribution that tokens are chosen from.

A formula of one's own is such a function in any module (docs/formulas.md).
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from proxytune.errors import UserError
from proxytune.proxy import Formula, combine_logits, traits, traits_of
from proxytune.records import finite

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
        raise UserError(f"dexperts: top_k={top_k!r}, top_p={top_p!r}; top_p is in 0..1, top_k >= 0")
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


def choose(formula: Formula | None, helpers: Sequence[str], lists_few: bool = False) -> Formula:
    """The formula for a base and these helpers: the given one, or proxy-tuning.

    Args:
        formula: None for the default.
        helpers: the roles beside the base.
        lists_few: whether the base lists only its likeliest tokens (behind an API).

    Raises:
        UserError: it needs other models, or the base has to list every token.
    """
    if formula is None:
        formula = combine_logits if set(helpers) == {"expert", "antiexpert"} else sum_of_pairs
    needs, _ = needs_of(formula)
    if not _takes_any(formula) and set(helpers) != set(needs):
        raise UserError(
            f"formula={name_of(formula)} combines the base with {_list(needs)}; "
            f"given: {_list(helpers)}"
        )
    if lists_few and not traits_of(formula).rises:
        raise UserError(
            f"formula={name_of(formula)} needs every logit of the base, and its API lists the "
            "likeliest only; use a server that lists all (api.top_logprobs=-1), or formula=proxy"
        )
    return formula


def alphas_of(
    formula: Formula, alpha: float | Mapping[str, float], helpers: Sequence[str]
) -> dict[str, float]:
    """The alphas as a formula names them.

    Args:
        formula: see `choose`.
        alpha: one number for all, or the name of a pair -> its number.
        helpers: the roles beside the base.

    Raises:
        UserError: a pair has no alpha or there is no such pair, or the formula takes none.
    """
    names = needs_of(formula)[1]
    if _takes_any(formula):
        names += [role.removesuffix("expert") + "alpha" for role in experts_of(helpers)]
    if not isinstance(alpha, Mapping):
        if not names and alpha != 1:
            raise UserError(f"formula={name_of(formula)} takes no alpha; leave alpha={alpha} out")
        return dict.fromkeys(names, finite("alpha", alpha))
    given = {f"{name}_alpha": finite(f"alpha of {name}", each) for name, each in alpha.items()}
    if given.keys() != set(names):
        raise UserError(
            f"alpha names {_list(list(alpha))}; the formula's pairs are "
            f"{_list([name.removesuffix('_alpha') for name in names])}"
        )
    return given


def try_out(
    formula: Formula, helpers: Sequence[str], alphas: Mapping[str, float], vocab_size: int
) -> None:
    """Combines random logits, to see whether a formula and its settings can be used.

    Args:
        formula: see `choose`.
        helpers: the roles beside the base.
        alphas: see `alphas_of`.
        vocab_size: of the models.

    Raises:
        UserError: a setting is impossible, or the result is not the combined logits: its shape or
            type is another one, a row depends on other rows, or the members' logits were changed.
    """
    generator = torch.Generator().manual_seed(0)
    roles = ("base", *helpers)
    logits = {role: torch.randn(2, vocab_size, generator=generator) for role in roles}
    before = {role: each.clone() for role, each in logits.items()}
    both = formula(**logits, **alphas)
    alone = formula(**{role: each[1:] for role, each in before.items()}, **alphas)
    reason = None
    if not isinstance(both, torch.Tensor) or both.shape != logits["base"].shape:
        reason = f"gives {tuple(both.shape) if isinstance(both, torch.Tensor) else type(both)}"
        reason += f" for logits of {tuple(logits['base'].shape)}"
    elif both.dtype != torch.float32:
        reason = f"gives {both.dtype}; combine `base.float()`"
    elif any(not torch.equal(logits[role], before[role]) for role in roles):
        reason = "changes the logits that it is given; work on copies"
    elif not torch.equal(alone[0], both[1]):
        reason = "gives a row other logits when other rows stand beside it"
    if reason:
        raise UserError(f"formula={name_of(formula)} {reason}")


def experts_of(roles: Sequence[str]) -> list[str]:
    """Those of these roles that are experts ("expert", "NAME_expert")."""
    return [role for role in roles if role == "expert" or role.endswith("_expert")]


def needs_of(formula: Formula) -> tuple[list[str], list[str]]:
    """The roles that a formula needs beside the base, and its alphas, by their names.

    Raises:
        UserError: it is no function of these.
    """
    try:
        parameters = inspect.signature(formula).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"formula={formula!r} is no function of logits") from error
    named = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIABLE]
    alphas = [name for name in named if name == "alpha" or name.endswith("_alpha")]
    roles = [name for name in named if name not in alphas and name != "base"]
    odd = [role for role in roles if not re.fullmatch(r"(\w+_)?(anti)?expert", role)]
    if "base" not in named or odd:
        raise UserError(
            f"formula={name_of(formula)} takes {_list(named)}; its parameters are base, the "
            "members that it needs (expert, antiexpert) and alpha. Settings of its own need a "
            "value, or a default"
        )
    return roles, alphas


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _takes_any(formula: Formula) -> bool:
    """Whether a formula takes members of any name."""
    kinds = {parameter.kind for parameter in inspect.signature(formula).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def name_of(formula: Formula) -> str:
    """A formula's name, for messages."""
    function = formula.func if isinstance(formula, partial) else formula
    return function.__name__ if inspect.isfunction(function) else repr(function)


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "nothing"
