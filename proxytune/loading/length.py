"""Whether a text is too long, seen before the whole of it is encoded.

A tokenizer reads about a megabyte per second, and a text that cannot fit is refused in any case.
"""

import json
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from proxytune.engine.text import BYTE_OF

_PLAIN = 8  # characters per token; a text with fewer is encoded at once
_UNSURE = 8  # words at the end of a cut text that may be other words in the whole text
# Unicode's canonical forms shorten a text by less than this factor: 3.5 (U+1FBE, a diaeresis and an
# acute are 7 bytes, and the one letter U+0390 two).
_CANONICAL = 4


def exceeds(text: str, tokenizer: Any, most: int) -> bool:
    """Whether a text certainly has more than `most` tokens.

    Two proofs are tried: no token stands for more bytes than the longest one has; and the words at
    the beginning of the text have more tokens than that.

    Args:
        text: what a model is to read.
        tokenizer: the model's.
        most: tokens, special ones not counted.

    Returns:
        False where it is not certain: the text has to be encoded.
    """
    if len(text) <= _PLAIN * most:
        return False
    if tokenizer not in _longest:
        _longest[tokenizer] = bytes_per_token(tokenizer)
    longest = _longest[tokenizer]
    if longest is not None and len(text.encode("utf-8", "surrogatepass")) > most * longest:
        return True
    size = _PLAIN * most
    while size < len(text) and getattr(tokenizer, "is_fast", False):
        words = tokenizer(text[:size], add_special_tokens=False).word_ids()
        words = [word for word in words if word is not None]
        certain = max(words, default=0) - _UNSURE
        if certain <= 0:  # the tokenizer does not split texts into words
            return False
        if sum(word < certain for word in words) > most:
            return True
        size *= 4
    return False


_longest: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()


def bytes_per_token(tokenizer: Any) -> int | None:
    """The most bytes of a text that one token stands for.

    Returns:
        None where there is no such number: the tokenizer drops a part of the text, or writes one
        token for any number of unknown characters.
    """
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(core, "to_str"):
        return None
    spec = json.loads(core.to_str())
    model, added = spec["model"], spec["added_tokens"]
    steps = [*_steps(spec["normalizer"]), *_steps(spec["pre_tokenizer"])]
    if model["type"] != "BPE" or not all(map(_keeps, steps)):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):  # they take spaces beside them
        return None
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    letters = BYTE_OF.keys() if byte_level else {f"<0x{byte:02X}>" for byte in range(256)}
    if not letters <= model["vocab"].keys() or not (byte_level or model["byte_fallback"]):
        return None
    lengths = [len(token if byte_level else token.encode()) for token in model["vocab"]]
    lengths += [len(token["content"].encode()) for token in added]
    canonical = any(step["type"] in ("NFC", "NFD") for step in steps)
    return max(lengths) * (_CANONICAL if canonical else 1)


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's steps, one by one."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for each in step.get("normalizers", step.get("pretokenizers", ())):
            yield from _steps(each)
    else:
        yield step


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step leaves at least as many bytes as it takes; NFC and NFD have their factor."""
    if step["type"] == "Split":
        return step["behavior"] != "Removed"
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String", "")
        return 0 < len(pattern.encode()) <= len(step["content"].encode())
    return step["type"] in ("ByteLevel", "Digits", "Metaspace", "Prepend", "NFC", "NFD")
