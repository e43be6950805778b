"""Texts that others wrote (models, strangers' folders, servers), on their way to a terminal."""

import sys


def visible(text: str) -> str:
    """The text with escapes for what would steer a terminal, or turn the reading order around.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def one_line(text: str) -> str:
    """A text in one line that cannot steer the terminal, and that the terminal can show."""
    joined = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    encoding = sys.stdout.encoding or "utf-8"
    return joined.encode(encoding, errors="replace").decode(encoding)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
