"""lm-eval's flat --model_args as models to load."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch

from proxytune.errors import UserError
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.proxy import Formula

log = logging.getLogger(__name__)

_ROLES = ("base", "expert", "antiexpert")
# A member's argument: "expert_revision"; of several pairs "math_expert" (its model) and
# "math_expert_revision". A pair's name has small letters and digits (`roles.check_pair`).
_MEMBER = re.compile(
    r"(?P<role>base|(?:[a-z][a-z0-9]*_)?(?:anti)?expert)(?:_(?P<field>[a-z0-9_]+))?"
)
_FIELDS = {field.name for field in fields(ModelSpec)} - {"id", "quantization", "api"} | {
    "chat_template",
    "use_system",
    "think_start",
    "think_end",
    "template_kwargs",
    "load_in_4bit",
    "load_in_8bit",
}


def specs_of(
    ids: Mapping[str, str | None], dtype: str, device: str | None, members: Mapping[str, Any]
) -> dict[str, ModelSpec]:
    """Role -> the model to load, from lm-eval's flat arguments.

    Args:
        ids: role -> path or hub id; None for a role without a model.
        dtype: of every member.
        device: of every member.
        members: `<pair>_expert` and `<pair>_antiexpert` -> path or hub id of several pairs;
            `<role>_<field>` -> value; see `harness.model.ProxyTuneLM`.

    Raises:
        UserError: an unknown argument, one for a role without a model, half a pair, or no base.
    """
    given = {role: name for role, name in ids.items() if name}
    fields_of: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in members.items():
        match = _MEMBER.fullmatch(name)
        if match is None or match["field"] not in (None, *_FIELDS) or name in _ROLES:
            raise UserError(
                f"unknown argument {name!r} in --model_args; a member's are "
                f"<{'|'.join(_ROLES)}>_<{'|'.join(sorted(_FIELDS))}>, and those of several pairs "
                "<pair>_<expert|antiexpert|alpha>"
            )
        if match["field"] is None:
            given[match["role"]] = value
        else:
            fields_of[match["role"]][match["field"]] = value
    if "base" not in given:
        raise UserError("--model_args needs base=... (a path or hub id)")
    _check_roles(given, fields_of)
    return {
        role: _spec(role, name, {"dtype": dtype, "device": device}, fields_of[role])
        for role, name in given.items()
    }


def _check_roles(given: Mapping[str, str], fields_of: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses settings of a role without a model, and half a pair."""
    for role, settings in fields_of.items():
        if role not in given:
            field, value = next(iter(settings.items()))
            raise UserError(f"{role}_{field}={value} is given without {role}=...")
    for role in given:
        pair, _, half = role.rpartition("_")
        other = f"{pair}_{'antiexpert' if half == 'expert' else 'expert'}"
        if pair and other not in given:
            raise UserError(f"{role}={given[role]} is given without {other}=...")


def _spec(role: str, name: str, usual: Mapping[str, Any], given: Mapping[str, Any]) -> ModelSpec:
    """The model of one role.

    Args:
        role: its role.
        name: path or hub id.
        usual: settings of every member.
        given: its own, by the names in `_FIELDS`.
    """
    settings: dict[str, Any] = dict(usual)
    fmt: dict[str, Any] = {}
    for field, value in given.items():
        if field == "format":
            fmt["kind"] = value
        elif field in ("chat_template", "use_system"):
            fmt = {"kind": "chat", **fmt, field: value}
        elif field in ("think_start", "think_end"):
            fmt[field] = value
        elif field == "template_kwargs":
            fmt[field] = _mapping(f"{role}_{field}", value)
        elif field in ("load_in_4bit", "load_in_8bit"):
            settings["quantization"] = {field: value}
        else:
            settings[field] = value
    return ModelSpec(name, **settings, format=PromptFormat(**fmt))


def alphas_of(members: dict[str, Any]) -> dict[str, float]:
    """The pairs' own alphas, pair -> number; they are taken out of `members`."""
    given = [name for name in members if name.endswith("_alpha")]
    return {name.removesuffix("_alpha"): number(name, members.pop(name)) for name in given}


def number(name: str, value: Any) -> float:
    """A number that may have been given as a text.

    Raises:
        UserError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value}: it must be a number") from error


def with_alphas(
    specs: Mapping[str, ModelSpec], alpha: float, own: Mapping[str, float]
) -> float | dict[str, float]:
    """The alpha of a triple; with several pairs, pair -> its own.

    Args:
        specs: role -> model.
        alpha: of every pair without one of its own.
        own: pair -> its own.

    Raises:
        UserError: an alpha is for a pair that is not there.
    """
    pairs = [role.removesuffix("_expert") for role in specs if role.endswith("_expert")]
    odd = next((name for name in own if name not in pairs), None)
    if odd is not None:
        raise UserError(f"{odd}_alpha={own[odd]} is given without {odd}_expert=...")
    return {pair: own.get(pair, alpha) for pair in pairs} if pairs else alpha


def template_variables(
    given: Mapping[str, Any] | str | None, enable_thinking: bool | None
) -> dict[str, Any]:
    """The variables of chat templates, as lm-eval's `hf` model names them.

    Args:
        given: `chat_template_args`, a mapping or JSON.
        enable_thinking: one of them by a name of its own.

    Raises:
        UserError: `chat_template_args` is no mapping.
    """
    found = _mapping("chat_template_args", given) if given else {}
    return found if enable_thinking is None else found | {"enable_thinking": enable_thinking}


def formula_of(name: str | None, members: dict[str, Any]) -> Formula | None:
    """The formula of lm-eval's flat arguments; its settings are taken out of `members`.

    Args:
        name: of a function in `proxytune.formula`, or MODULE.FUNCTION; None for proxy-tuning.
        members: the further arguments; `formula_<setting>` are the formula's.

    Raises:
        UserError: there is no such function.
    """
    given = [key for key in members if key.startswith("formula_")]
    settings = {key.removeprefix("formula_"): members.pop(key) for key in given}
    if name in (None, "proxy"):
        if settings:
            raise UserError(f"{given[0]} is given without formula=...")
        return None
    module, _, function = str(name).rpartition(".")
    try:
        found = getattr(import_module(module or "proxytune.formula"), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"formula={name} cannot be imported ({error}); known: proxy, dexperts, gated, "
            "contrastive, guidance, and MODULE.FUNCTION on PYTHONPATH"
        ) from error
    return partial(found, **settings) if settings else found


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping that was given as one, or as JSON.

    Raises:
        UserError: it is neither.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise UserError(f'{name}={value!r} is no JSON object; {name}={{"enable_thinking":false}}')
    return dict(found)


def usable_device(device: str | None) -> str | None:
    """The device, or the CPU if the device is a GPU (lm-eval's default) and there is none."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("there is no %s here; the CPU is used", device)
        return "cpu"
    return device


def batch_rows(batch_size: int | str) -> int | Literal["auto"]:
    """Rows at once; lm-eval's "auto" and "auto:N" are our "auto".

    Raises:
        UserError: it is no number of rows.
    """
    if str(batch_size).startswith("auto"):
        return "auto"
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"batch_size={batch_size}: it must be at least 1, or auto")
    return int(batch_size)
