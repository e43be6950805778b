"""Errors that are not our bugs."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the person who asks; the message names the value and the way out.

    The commands end in this one line. Every other error keeps its traceback.
    """


class MissingExtra(UserError):
    """A package of an optional extra is not installed.

    Args:
        extra: its name in pyproject.toml.
        purpose: what needs it, as the beginning of a sentence.
        error: the failed import.
    """

    def __init__(self, extra: str, purpose: str, error: ImportError) -> None:
        package = (error.name or "a package").partition(".")[0]
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'proxytune[{extra}]'"
        )


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
        if (error.name or "").partition(".")[0] in ("proxytune", "tasks"):
            raise  # a bug of ours
        raise MissingExtra(name, purpose, error) from error


class UpstreamError(Exception):
    """A member's server cannot be used any more; the message gives the reason and the way out."""


class Unanswered(UpstreamError, OSError):
    """The server has not answered within the time that we wait for it."""
