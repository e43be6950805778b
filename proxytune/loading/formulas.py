"""Whether a formula can combine these models: what it takes, and what it gives."""

import inspect
import re
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from proxytune.errors import UserError
from proxytune.formula import sum_of_pairs
from proxytune.loading.spec import ModelSpec
from proxytune.proxy import Formula, combine_logits, traits_of
from proxytune.records import finite

Alphas = float | Mapping[str, float]  # one for all, or the name of a pair -> its number

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def settle(
    formula: Formula | None,
    alpha: Alphas,
    helpers: Sequence[str],
    *,
    few: bool = False,
    vocab_size: int | None = None,
    vocabulary: str = "strict",
) -> tuple[Formula, dict[str, float]]:
    """The formula of a base and these helpers, and its alphas as it names them.

    Args:
        formula: see `choose`.
        alpha: see `alphas_of`.
        helpers: the roles beside the base.
        few: see `choose`.
        vocab_size: of the models; None where it is not known yet, and the formula is not tried.
        vocabulary: see `proxytune.load`.

    Raises:
        UserError: see `choose`, `alphas_of` and `try_out`.
    """
    chosen = choose(formula, helpers, few)
    if few and vocabulary != "strict" and not traits_of(chosen).adds:
        # Helpers agree with the base about tokens that they lack, so its bounds bound nothing.
        raise UserError(
            f"formula={name_of(chosen)} with vocabulary={vocabulary} needs every logit of the "
            "base, and its API lists the likeliest only; use formula=proxy, or a server that lists "
            "all (api.top_logprobs=-1)"
        )
    alphas = alphas_of(chosen, alpha, helpers)
    if vocab_size is not None:
        try_out(chosen, helpers, alphas, vocab_size)
    return chosen, alphas


def lists_few(specs: Mapping[str, ModelSpec]) -> bool:
    """Whether the base is behind an API and asked for its likeliest tokens only."""
    api = specs["base"].api if "base" in specs else None
    return api is not None and api.top_logprobs != -1


def choose(formula: Formula | None, helpers: Sequence[str], few: bool = False) -> Formula:
    """The formula for a base and these helpers: the given one, or proxy-tuning.

    Args:
        formula: None for the default.
        helpers: the roles beside the base.
        few: whether the base lists only its likeliest tokens (`lists_few`).

    Raises:
        UserError: it needs other models, or the base has to list every token.
    """
    if formula is None:
        formula = combine_logits if set(helpers) == {"expert", "antiexpert"} else sum_of_pairs
    needs, _ = needs_of(formula)
    if not needs and not takes_any(formula):
        raise UserError(
            f"formula={name_of(formula)} combines nothing with the base; a formula has a parameter "
            "for each member that it needs (expert, antiexpert)"
        )
    if not helpers or (not takes_any(formula) and set(helpers) != set(needs)):
        raise UserError(
            f"formula={name_of(formula)} combines the base with {listed(needs)}; "
            f"given: {listed(helpers)}"
        )
    if few and not traits_of(formula).rises:
        raise UserError(
            f"formula={name_of(formula)} needs every logit of the base, and its API lists the "
            "likeliest only; use a server that lists all (api.top_logprobs=-1), or formula=proxy"
        )
    return formula


def alphas_of(formula: Formula, alpha: Alphas, helpers: Sequence[str]) -> dict[str, float]:
    """The alphas as a formula names them.

    Args:
        formula: see `choose`.
        alpha: see `Alphas`.
        helpers: the roles beside the base.

    Raises:
        UserError: a pair has no alpha or there is no such pair, or the formula takes none.
    """
    names = needs_among(formula, helpers)[1]
    if not isinstance(alpha, Mapping):
        if not names and alpha != 1:
            raise UserError(f"formula={name_of(formula)} takes no alpha; leave alpha={alpha} out")
        return dict.fromkeys(names, finite("alpha", alpha))
    given = {f"{name}_alpha": finite(f"alpha of {name}", each) for name, each in alpha.items()}
    if given.keys() != set(names):
        raise UserError(
            f"alpha names {listed(list(alpha))}; the formula's pairs are "
            f"{listed([name.removesuffix('_alpha') for name in names])}"
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
        UserError: a setting is impossible, the function fails, or the result is not the combined
            logits: its shape or type is another one, it has no probabilities, a row depends on
            other rows, or the members' logits were changed.
    """
    generator = torch.Generator().manual_seed(0)
    roles = ("base", *helpers)
    logits = {role: torch.randn(2, vocab_size, generator=generator) for role in roles}
    before = {role: each.clone() for role, each in logits.items()}
    both = _called(formula, **logits, **alphas)
    alone = _called(formula, **{role: each[1:] for role, each in before.items()}, **alphas)
    reason = None
    if not isinstance(both, torch.Tensor) or both.shape != logits["base"].shape:
        reason = f"gives {tuple(both.shape) if isinstance(both, torch.Tensor) else type(both)}"
        reason += f" for logits of {tuple(logits['base'].shape)}"
    elif both.dtype != torch.float32:
        reason = f"gives {both.dtype}; combine `base.float()`"
    elif any(not torch.equal(logits[role], before[role]) for role in roles):
        reason = "changes the logits that it is given; work on copies"
    elif not (both.max(-1).values.isfinite().all() and both.isnan().sum() == 0):
        reason = "gives NaN, plus infinity, or minus infinity for every token, of ordinary logits"
    elif not torch.equal(alone[0], both[1]):
        reason = "gives a row other logits at a second call, or when other rows stand beside it"
    if reason:
        raise UserError(f"formula={name_of(formula)} {reason}")


def _called(formula: Formula, **given: Any) -> Any:
    """What a formula gives.

    Raises:
        UserError: it fails. A user's function may raise anything.
    """
    try:
        return formula(**given)
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"formula={name_of(formula)} fails on random logits: {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error


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
    if "base" not in named:
        raise UserError(
            f"formula={name_of(formula)} takes {listed(named)}; the parameters of a formula are "
            "base, the members that it needs (expert, antiexpert), alpha, and settings"
        )
    if odd:
        raise UserError(
            f"formula={name_of(formula)}: {listed(odd)} is no member (expert, antiexpert); if it "
            "is a setting, give it a value, or a default in the function"
        )
    return roles, alphas


def needs_among(formula: Formula, helpers: Sequence[str]) -> tuple[list[str], list[str]]:
    """The helpers that a formula combines with the base, and its alphas by their names."""
    needs, names = needs_of(formula)
    if not takes_any(formula):
        return needs, names
    pairs = [role.removesuffix("expert") + "alpha" for role in experts_of(helpers)]
    return list(helpers), names + pairs


def takes_any(formula: Formula) -> bool:
    """Whether a formula takes members of any name."""
    kinds = {parameter.kind for parameter in inspect.signature(formula).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def name_of(formula: Formula) -> str:
    """A formula's name, for messages."""
    function = formula.func if isinstance(formula, partial) else formula
    if function is combine_logits:
        return "proxy"  # as in conf/formula
    return function.__name__ if inspect.isfunction(function) else repr(function)


def listed(words: Sequence[str]) -> str:
    """Words for a message."""
    return ", ".join(words) or "nothing"
