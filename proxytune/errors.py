"""Errors that are not our bugs."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(ValueError):
    """A mistake of the person who asks; the message names the value and the way out.

    The commands end in this one line. Every other error keeps its traceback.
    """


class MissingExtra(UserError):
    """A package of an optional extra is not installed.

    Args:
        extra: its name in pyproject.toml.
        purpose: what needs it, as the beginning of a sentence.
        package: the one that is missing.
    """

    def __init__(self, extra: str, purpose: str, package: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'proxytune[{extra}]'"
        )


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A question that names the known word most like `name`; "" if there is none."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def need(package: str, extra: str, purpose: str) -> None:
    """Refuses, without importing anything, what an extra's package is missing for.

    Raises:
        MissingExtra: it is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtra(extra, purpose, package)


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Imports in this block need an extra of pyproject.toml.

    Args:
        name: of the extra.
        purpose: see `MissingExtra`.

    Raises:
        MissingExtra: one of its packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("proxytune", "tasks"):
            raise  # a bug of ours
        raise MissingExtra(name, purpose, package) from error


class UpstreamError(Exception):
    """A member's server cannot be used any more; the message gives the reason and the way out."""


class Unanswered(UpstreamError, OSError):
    """The server has not answered within the time that we wait for it."""
