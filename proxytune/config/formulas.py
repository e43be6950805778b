"""The configured formula, and the models that a system consists of under it.

Nothing here imports torch for proxy-tuning's own formula: most refusals come before that.
"""

import hashlib
import inspect
from functools import partial
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig

from proxytune.config.schema import DEFAULT_FORMULA, to_dict
from proxytune.errors import UserError
from proxytune.roles import MEMBERS


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
    try:
        function = get_method(target)
    except Exception as error:  # importing a user's module may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"formula._target_={target} cannot be imported ({reason}); its module must be on "
            "PYTHONPATH, or in the folder where the command is run"
        ) from error
    return partial(function, **settings) if settings else function


def members_of(cfg: DictConfig, system: str) -> dict[str, str]:
    """The models of a system: the engine's role -> the triple's name.

    Raises:
        UserError: see `formula_of`; or it is no function of logits.
    """
    if system != "proxy" or is_default(cfg):
        return dict(MEMBERS[system])
    from proxytune.loading.formulas import needs_of

    formula = formula_of(cfg)
    assert formula is not None
    return {role: role for role in ("base", *needs_of(formula)[0])}


def formula_identity(cfg: DictConfig) -> dict[str, Any]:
    """What completions depend on: the function, its settings, and a user's own source."""
    settings = to_dict(cfg.formula)
    if not settings["_target_"].startswith("proxytune."):
        source = inspect.getsource(get_method(settings["_target_"]))
        settings["source_sha256"] = hashlib.sha256(source.encode()).hexdigest()
    return settings


def gates(cfg: DictConfig) -> bool:
    """Whether runs count the tokens that the formula touches."""
    if is_default(cfg):
        return False
    from proxytune.proxy import traits_of

    formula = formula_of(cfg)
    return formula is not None and traits_of(formula).gates
