"""Optional parts of a configuration: set, extended and unset on the command line in one form.

    triple.tuned.id=X                               though the triple has no tuned model
    triple.base.quantization.load_in_4bit=true      though nothing is quantised
    triple.tuned=null                               though the triple has one

Hydra changes what the files composed: a part that is null has no keys to change, a mapping takes no
new ones, and of a task's class it knows the settings that the task's file names. So a part is made,
opened or completed right before the override that goes into it.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from inspect import isfunction, signature
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict

from proxytune.errors import UserError

CLOSED = {"closed": True}  # metadata of a mapping whose names come from files alone

_apply = ConfigLoaderImpl._apply_overrides_to_config


def install() -> None:
    """Makes every composition apply its overrides so; Hydra has no public place for it."""
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_prepare_and_apply)


def _prepare_and_apply(overrides: Sequence[Override], cfg: DictConfig) -> None:
    for override in overrides:  # one by one: an earlier one may unset what a later one goes into
        if override.is_delete():
            _check_deletion(cfg, override.key_or_group)
        else:
            prepare(cfg, override.key_or_group, override.value())
            if override.is_add() or override.is_force_add():
                override = replace(override, type=OverrideType.CHANGE)  # + would add any key
        _apply([override], cfg)


def _check_deletion(cfg: DictConfig, key: str) -> None:
    """Refuses `~key` of a setting that every configuration has.

    Raises:
        UserError: names the key.
    """
    where, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, where) if where else cfg
    if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)) and name in node:
        raise UserError(
            f"~{key}: it cannot be deleted; where it may be left out, {key}=null does it"
        )


def prepare(cfg: DictConfig, key: str, value: Any) -> None:
    """Makes and opens the optional parts that setting `key` to `value` goes into.

    Args:
        cfg: what the files composed.
        key: with dots between the names.
        value: a mapping goes into the part that `key` itself names.
    """
    names = key.split(".")
    node: Any = cfg
    for depth, name in enumerate(names):
        if not isinstance(node, DictConfig):
            return
        element = node._metadata.element_type
        if name not in node and is_dataclass(element):  # one more of a mapping's parts
            with open_dict(node):
                node[name] = element
        if name not in node:  # a file of conf/task names some of its class's settings
            if name in parameters(node):
                with open_dict(node):
                    node[name] = None
            return
        if depth == len(names) - 1 and not isinstance(value, dict):
            return
        part, closed = part_of(OmegaConf.get_type(node), name)
        if part is not None and node[name] is None:
            node[name] = {} if part is dict else part
        node = node[name]
        # what a task's file says of decoding is some of the keys of `records.Decoding`
        of_task = names[0] == "task" and depth == 2 and name == "decoding"
        if (part is dict and not closed) or (of_task and isinstance(node, DictConfig)):
            OmegaConf.set_struct(node, False)


def parameters(node: DictConfig) -> list[str]:
    """The settings of the class or the formula that a node names; none of any other node."""
    target = node.get("_target_")
    if not target:
        return []
    named = imported(target)
    try:
        known = signature(named).parameters.values()
    except ValueError:  # of a function in C
        return []
    if not isfunction(named):
        return [each.name for each in known]
    return [
        each.name
        for each in known
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and not re.fullmatch(r"base|(\w+_)?(expert|antiexpert|alpha)", each.name)  # a formula's
    ]


def imported(target: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        UserError: there is none. A user's module may raise anything.
    """
    module, _, name = target.rpartition(".")
    try:
        named = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UserError(
            f"_target_={target} cannot be imported ({type(error).__name__}: {error}); it is "
            "MODULE.NAME, and the module is on PYTHONPATH (PYTHONPATH=. for this folder)"
        ) from error
    if not callable(named):
        raise UserError(f"_target_={target} is {named!r}, and neither a class nor a function")
    return named


def part_of(schema: Any, name: str) -> tuple[type | None, bool]:
    """What a key of a schema is a part of: its dataclass, dict, or None for anything else.

    Returns:
        That type, and whether the command line may not add to it.
    """
    if not is_dataclass(schema):
        return None, True
    hint = get_type_hints(schema).get(name)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if _optional(hint) else [hint]
    closed = any(each.name == name and "closed" in each.metadata for each in fields(schema))
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind):
            return kind, closed
        if kind is dict or get_origin(kind) is dict:
            return dict, closed
    return None, closed


def _optional(hint: Any) -> bool:
    return NoneType in get_args(hint)
