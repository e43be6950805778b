"""Single tokens as text and as bytes, for log-probabilities."""

import json
import re
from typing import Any


class TokenTexts:
    """What each token of a vocabulary writes.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._special = set(tokenizer.all_special_ids)
        self._byte_level = "ByteLevel" in _decoder(tokenizer)
        # Some decoders drop the first token's leading space, so each token stands behind another.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before = self._decode(self._anchor)

    def text(self, token: int) -> str:
        """The text that a token adds to what stands before it; special tokens by their name."""
        if token not in self._texts:
            self._texts[token] = self._decode([*self._anchor, token])[len(self._before) :]
        return self._texts[token]

    def shown(self, token: int) -> str:
        """As `text`, but nothing for a special token: what it adds to a completion."""
        return "" if token in self._special else self.text(token)

    def bytes(self, token: int) -> list[int]:
        """The bytes of a token, also of one that holds only a part of a character."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token not in self._special and isinstance(name, str):
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
            if byte:
                return [int(byte[1], 16)]
            if self._byte_level and all(char in _BYTES for char in name):
                return [_BYTES[char] for char in name]
        return list(self.text(token).encode())

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _decoder(tokenizer: Any) -> str:
    core = getattr(tokenizer, "backend_tokenizer", None)
    return "" if core is None else json.dumps(json.loads(core.to_str()).get("decoder"))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
