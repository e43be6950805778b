"""The configured formula, and the models that a system consists of under it.

Nothing here imports torch for proxy-tuning's own formula: most refusals come before that.
"""

import hashlib
import inspect
from functools import partial
from typing import Any

from omegaconf import DictConfig

from proxytune.config.overrides import imported
from proxytune.config.schema import DEFAULT_FORMULA, to_dict
from proxytune.errors import UserError
from proxytune.roles import MEMBERS, check_pair


def is_default(cfg: DictConfig) -> bool:
    """Whether the formula is proxy-tuning's own."""
    return to_dict(cfg.formula) == DEFAULT_FORMULA


def formula_of(cfg: DictConfig) -> Any | None:
    """The formula (`proxytune.proxy.Formula`); None for proxy-tuning's own.

    Raises:
        UserError: there is no such function.
    """
    if is_default(cfg):
        return None
    settings = to_dict(cfg.formula)
    target = settings.pop("_target_", None)
    if not target:
        raise UserError("formula has no _target_: give formula=NAME, or formula._target_=MODULE.F")
    function = imported(target)
    return partial(function, **settings) if settings else function


def members_of(cfg: DictConfig, system: str) -> dict[str, str]:
    """The models of a system: the engine's role -> the triple's name.

    Raises:
        UserError: see `formula_of`; or it is no function of logits, or takes none of the pairs.
    """
    if system != "proxy" or (is_default(cfg) and not cfg.triple.pairs):
        return dict(MEMBERS[system])
    pairs = pair_roles(cfg)
    if is_default(cfg):
        return {role: role for role in ("base", *pairs)}
    from proxytune.loading.formulas import listed, name_of, needs_of, takes_any

    formula = formula_of(cfg)
    assert formula is not None
    if pairs and takes_any(formula):
        return {role: role for role in ("base", *pairs)}
    needs = needs_of(formula)[0]
    if pairs and not set(needs) & set(pairs):
        raise UserError(
            f"formula={name_of(formula)} combines the base with {listed(needs)}, and with none of "
            f"the triple's pairs ({listed([str(name) for name in cfg.triple.pairs])}); use a "
            "triple without pairs, or formula=proxy"
        )
    return {role: role for role in ("base", *needs)}


def pair_roles(cfg: DictConfig) -> list[str]:
    """The roles of the triple's pairs: NAME_expert and NAME_antiexpert of each.

    Raises:
        UserError: a pair has no usable name.
    """
    for name in cfg.triple.pairs:
        check_pair(str(name))
    return [f"{name}_{each}" for name in cfg.triple.pairs for each in ("expert", "antiexpert")]


def alphas(cfg: DictConfig) -> float | dict[str, float]:
    """The run's alpha; with several pairs, NAME -> that of the pair."""
    if not any(role.endswith("_expert") for role in members_of(cfg, "proxy")):
        return cfg.alpha
    own = {str(name): pair.alpha for name, pair in cfg.triple.pairs.items()}
    return {name: cfg.alpha if alpha is None else alpha for name, alpha in own.items()}


def member_of(cfg: DictConfig, name: str) -> DictConfig | None:
    """The settings of a model of the triple: "tuned", or "math_expert" of the pair math."""
    pair, _, role = name.rpartition("_")
    return cfg.triple.pairs[pair][role] if pair else cfg.triple[name]


def key_of(role: str) -> str:
    """Where a member's settings stand: triple.expert, triple.pairs.math.expert."""
    pair, _, name = role.rpartition("_")
    return f"triple.pairs.{pair}.{name}" if pair else f"triple.{role}"


def formula_identity(cfg: DictConfig) -> dict[str, Any]:
    """What completions depend on: the function, its settings, and a user's own source."""
    settings = to_dict(cfg.formula)
    if not settings["_target_"].startswith("proxytune."):
        source = inspect.getsource(imported(settings["_target_"]))
        settings["source_sha256"] = hashlib.sha256(source.encode()).hexdigest()
    return settings


def gates(cfg: DictConfig) -> bool:
    """Whether runs count the tokens that the formula touches."""
    if is_default(cfg):
        return False
    from proxytune.proxy import traits_of

    formula = formula_of(cfg)
    return formula is not None and traits_of(formula).gates
