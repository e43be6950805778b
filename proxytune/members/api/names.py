"""The server's names of tokens -> token ids of the triple's vocabulary."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.engine.text import BYTE_OF, is_byte_level

_TOKEN_ID = "token_id:"
_BYTES = "bytes:"  # OpenAI's completions name a token of invalid UTF-8 by bytes:\xe2\x80


@dataclass(frozen=True)
class Named:
    """One listed token as the server names it.

    Attributes:
        logprob: its log-probability; None if the server lists it without one.
        text: its name: its text, or "token_id:<int>".
        id: its id, if the server gives it.
        bytes: its UTF-8 bytes, if the server gives them.
    """

    logprob: float | None
    text: str = ""
    id: int | None = None
    bytes: Sequence[int] | None = None

    @property
    def key(self) -> int | str | tuple[int, ...]:
        """The name itself."""
        if self.id is not None:
            return self.id
        return self.text if self.bytes is None else tuple(self.bytes)

    @property
    def by_text(self) -> bool:
        """Whether the text is the whole name, so that several tokens may share it."""
        return self.id is None and self.bytes is None and not self.text.startswith(_TOKEN_ID)


class TokenNames:
    """Finds the ids that a listed token may have: one, several (ambiguous), or none (unknown).

    Args:
        tokenizer: the triple's.
        vocab_size: number of ids that all members share; greater ids are unknown.
        foreign: the server's tokenizer is another one. A listed word then stands for the token
            that writes it after a space (" A" and "A" are both "▁A"), because a prompt ends
            without a space.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, foreign: bool = False) -> None:
        self.vocab_size = vocab_size
        self._foreign = foreign
        self._by_text: dict[str, set[int]] = defaultdict(set)
        self._by_bytes: dict[bytes, set[int]] = defaultdict(set)
        special = set(tokenizer.added_tokens_decoder)
        texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], skip_special_tokens=False)
        pieces = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
        byte_level = is_byte_level(tokenizer)
        for token, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            self._by_text[text].add(token)
            if piece is not None:
                self._by_text[piece].add(token)
                raw = piece.encode() if token in special else _bytes_of(piece, byte_level)
                self._by_bytes[raw].add(token)

    def ids(self, named: Named) -> tuple[int, ...]:
        """The ids that a listed token may have."""
        if self._foreign:
            return self._written_alone(named.text)
        if named.id is None and named.text.startswith(_TOKEN_ID):
            number = named.text[len(_TOKEN_ID) :].strip()
            named = Named(named.logprob, id=int(number) if number.isdecimal() else -1)
        if named.id is not None:
            return (named.id,) if 0 <= named.id < self.vocab_size else ()
        if named.bytes is not None:
            return tuple(sorted(self._by_bytes.get(bytes(named.bytes), ())))
        if named.text.startswith(_BYTES):
            return tuple(sorted(self._by_bytes.get(_unescaped(named.text[len(_BYTES) :]), ())))
        return tuple(sorted(self._by_text.get(named.text, ())))

    def exact(self, named: Named) -> int | None:
        """The id that the server gives for a token; None if it gives another kind of name."""
        by_id = named.id is not None or named.text.startswith(_TOKEN_ID)
        return next(iter(self.ids(named)), None) if by_id and not self._foreign else None

    def _written_alone(self, text: str) -> tuple[int, ...]:
        word = text.strip().encode()
        for raw in (b" " + word, word):
            if word and self._by_bytes.get(raw):
                return (min(self._by_bytes[raw]),)
        return ()


def _bytes_of(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTE_OF[char] for char in piece) if set(piece) <= BYTE_OF.keys() else b""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte tokens
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _unescaped(text: str) -> bytes:
    r"""The bytes of "\xe2\x80", with plain ASCII characters between."""
    return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
