"""A request's own formula and alphas, on models that are loaded."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from proxytune.engine.combining import Combination
from proxytune.errors import UserError
from proxytune.formula import guidance, sum_of_pairs
from proxytune.loading.formulas import (
    Alphas,
    experts_of,
    listed,
    name_of,
    needs_among,
    try_out,
)
from proxytune.proxy import Formula, combine_logits
from proxytune.records import finite

_TRIED = 8  # logits of a row on which a formula's settings are tried


def combination_of(
    formula: Formula | None,
    alpha: Alphas | None,
    system: Combination,
    *,
    few: bool = False,
    two_prompts: bool = False,
) -> Combination:
    """What a request asks for.

    Args:
        formula: one of `formula.shipped`, which takes some or all of the system's members; None
            takes the system's.
        alpha: one for all pairs, or the name of a pair -> its number; what it leaves out is the
            system's, or 1 where the system's formula has no such alpha.
        system: the system's own.
        few: whether the base lists only its likeliest tokens.
        two_prompts: whether the antiexpert is the base itself, under another prompt.

    Raises:
        UserError: the formula needs other models, a setting or an alpha is impossible, or the base
            lists few tokens and the formula is another one.
    """
    helpers = [role for role in system.roles if role != "base"]
    if formula is combine_logits and "expert" not in helpers and experts_of(helpers):
        formula = sum_of_pairs
    if formula is None or _parts(formula) == _parts(system.formula):
        formula = system.formula
    needs, names = needs_among(formula, helpers)
    alphas = {name: system.alphas.get(name, 1.0) for name in names}
    if formula is not system.formula:
        _check_models(formula, needs, helpers, two_prompts)
        if few:
            raise UserError(
                f"formula {name_of(formula)}: the API of the base lists its likeliest tokens only, "
                f"so all requests have the server's formula ({name_of(system.formula)})"
            )
        try_out(formula, needs, alphas, _TRIED)
    return Combination(formula, ("base", *needs), alphas | _given(alpha, names))


def _parts(formula: Formula) -> tuple[Formula, dict[str, Any]]:
    """A function and its settings, which two formulas may have in common."""
    return (formula.func, formula.keywords) if isinstance(formula, partial) else (formula, {})


def _check_models(
    formula: Formula, needs: Sequence[str], helpers: Sequence[str], two_prompts: bool
) -> None:
    """Refuses a formula of other models than those that are loaded.

    Args:
        formula: the formula.
        needs: the roles that it combines with the base.
        helpers: those that there are.
        two_prompts: see `combination_of`.
    """
    if not set(needs) <= set(helpers):
        raise UserError(
            f"formula {name_of(formula)} combines the base with {listed(needs)}; "
            f"there is {listed(helpers)}"
        )
    if formula is guidance and not two_prompts:
        raise UserError(
            "formula guidance combines two prompts of one model: its antiexpert is the base's "
            "checkpoint, and here it is another one"
        )


def _given(alpha: Alphas | None, names: Sequence[str]) -> dict[str, float]:
    """The alphas of a request, by a formula's names for them.

    Raises:
        UserError: the formula has none, or no pair of that name.
    """
    if alpha is None:
        return {}
    if isinstance(alpha, float | int):
        if not names:
            raise UserError(f"the formula takes no alpha; leave alpha={alpha} out")
        return dict.fromkeys(names, finite("alpha", alpha))
    pairs = [name.removesuffix("_alpha") for name in names if name != "alpha"]
    odd = next((name for name in alpha if name not in pairs), None)
    if odd is not None:
        known = (
            f"the pairs are {listed(pairs)}" if pairs else "without several pairs it is a number"
        )
        raise UserError(f"alpha of {odd!r}: there is no such pair; {known}")
    return {f"{name}_alpha": finite(f"alpha of {name}", each) for name, each in alpha.items()}
