"""lm-eval's flat --model_args as models to load."""

import json
import logging
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
        members: `<role>_<field>` -> value; see `harness.model.ProxyTuneLM`.

    Raises:
        UserError: an unknown argument, one for a role without a model, or no base.
    """
    settings: dict[str, dict[str, Any]] = {
        role: {"dtype": dtype, "device": device} for role in _ROLES
    }
    formats: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in members.items():
        role, _, field = name.partition("_")
        if role not in _ROLES or field not in _FIELDS:
            raise UserError(
                f"unknown argument {name!r} in --model_args; a member's are "
                f"<{'|'.join(_ROLES)}>_<{'|'.join(sorted(_FIELDS))}>"
            )
        if not ids[role]:
            raise UserError(f"{name}={value} is given without {role}=...")
        if field == "format":
            formats[role]["kind"] = value
        elif field in ("chat_template", "use_system"):
            formats[role] = {"kind": "chat"} | formats[role] | {field: value}
        elif field in ("think_start", "think_end"):
            formats[role][field] = value
        elif field == "template_kwargs":
            formats[role][field] = _mapping(name, value)
        elif field in ("load_in_4bit", "load_in_8bit"):
            settings[role]["quantization"] = {field: value}
        else:
            settings[role][field] = value
    if not ids["base"]:
        raise UserError("--model_args needs base=... (a path or hub id)")
    return {
        role: ModelSpec(name, **settings[role], format=PromptFormat(**formats[role]))
        for role, name in ids.items()
        if name
    }


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
        raise UserError(f"formula={name} cannot be imported ({error})") from error
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
    if not isinstance(found, dict):
        raise UserError(f'{name}={value!r} is no JSON object; {name}={{"enable_thinking":false}}')
    return found


def usable_device(device: str | None) -> str | None:
    """The device, or the CPU if the device is a GPU (lm-eval's default) and there is none."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("there is no %s here; the CPU is used", device)
        return "cpu"
    return device


def batch_rows(batch_size: int | str) -> int | Literal["auto"]:
    """Rows at once; lm-eval's "auto" and "auto:N" are our "auto"."""
    return "auto" if str(batch_size).startswith("auto") else int(batch_size)
