"""Passwords and keys in addresses, which must not reach files, pages, logs or a tracker."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from proxytune.terminal import visible

_USER = re.compile(r"(://)[^/?#@\s]+(@)")  # https://name:password@host, https://token@host
_KEY = re.compile(r"([?&](?:[\w-]*(?:key|token|secret|password|signature))=)[^&#\s'\"]+", re.I)


def redacted(value: Any) -> Any:
    """The same JSON value with *** for the secrets of the addresses in its texts."""
    if isinstance(value, str):
        return _KEY.sub(r"\1***", _USER.sub(r"\1***\2", value))
    if isinstance(value, Mapping):
        return {key: redacted(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(each) for each in value]
    return value


class RedactingFormatter(logging.Formatter):
    """Writes log lines without the secrets of the addresses in them, and steers no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return visible(redacted(super().format(record)))
