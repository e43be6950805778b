"""Data inside of a page, packed so that a page of a thousand examples stays small."""

import base64
import gzip
import json
from typing import Any


def pack(value: Any) -> str:
    """A JSON value as gzip in base64; `page.unpack` of page.js reads it."""
    text = json.dumps(value, separators=(",", ":"))
    # without a time stamp, the same results give the same page
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def short(value: Any, limit: int = 400) -> str:
    """A text as it is, another value as JSON; cut after `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "…"
