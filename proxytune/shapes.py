"""Whether a JSON value has the shape that a record or a type hint asks for."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

typed = cache(get_type_hints)


@cache
def shape_of(record: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of a record's fields, and the names of those that must be given."""
    needed = {
        field.name
        for field in fields(record)
        if field.default is MISSING and field.default_factory is MISSING
    }
    return get_type_hints(record), needed


def misfit(row: Any, hints: Mapping[str, Any], needed: set[str]) -> str | None:
    """Why a JSON value does not fit the fields of a record; None if it does."""
    if not isinstance(row, dict):
        return "it is no object"
    if unknown := row.keys() - hints.keys():
        return f"it has an unknown {min(unknown)!r}"
    if missing := needed - row.keys():
        return f"it has no {min(missing)!r}"
    wrong = next((key for key, value in row.items() if not fits(value, hints[key])), None)
    return f"its {wrong!r} is of another type" if wrong else None


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a record's field."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if kind is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if is_dataclass(hint):
        return misfit(value, *shape_of(hint)) is None
    if is_typeddict(hint):
        known = typed(hint).items()
        return isinstance(value, dict) and all(fits(value[k], h) for k, h in known if k in value)
    if isinstance(value, bool):  # which Python counts among the integers
        return hint is bool
    if hint is float:  # 1e999 is read as infinite, and an integer may be too large
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)
