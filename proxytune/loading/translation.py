"""Which tokens of two vocabularies write the same bytes: makes a `Translation`."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from proxytune.engine.text import BYTE_OF, TokenTexts, is_byte_level
from proxytune.members.translated import Translation

_CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
# GPT-2's alphabet -> characters below U+0100; those that it lacks -> one that is not below it.
_TO_LATIN = dict.fromkeys(range(256), 0xFFFD) | {ord(c): byte for c, byte in BYTE_OF.items()}
BYTE_LEVEL, BARS = "byte_level", "bars"  # GPT-2's characters; SentencePiece's bars for spaces
_SAMPLE = 512  # ids by which `Translation.growth` is estimated


class Tokens:
    """The tokens of one vocabulary.

    A token is known by its bytes; an added one (`</s>`) by its name, too.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: ids from there on are left out.
        ends: the tokens that end a text.

    Attributes:
        pieces: the tokenizer's name of each id; None for an id without a token.
        added: id -> the text of an added token.
        bytes: the bytes that each id writes; None where they are unknown, or where the token is
            a special one, which writes no text.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.ends = frozenset(token for token in ends if token < size)
        self.pieces: list[Any] = [None] * size
        for piece, token in tokenizer.get_vocab().items():
            if token < size:
                self.pieces[token] = piece
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= set(tokenizer.all_special_ids) | self.ends
        self.added = {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if token < size
        }
        self.form = _form(tokenizer)
        plain = None if self.form else TokenTexts(tokenizer)
        self.bytes = [
            None if token in special else self._bytes_of(token, plain) for token in range(size)
        ]
        self.by_bytes: dict[bytes, list[int]] = defaultdict(list)
        for token, raw in enumerate(self.bytes):
            if raw:
                self.by_bytes[raw].append(token)
        self.longest = max(map(len, self.by_bytes), default=0)

    def _bytes_of(self, token: int, texts: TokenTexts | None) -> bytes | None:
        """The bytes of one token; by decoding it where the form of the pieces is unknown."""
        piece = self.pieces[token]
        if token in self.added or piece is None:
            return self.added[token].encode() if token in self.added else None
        if texts is None or isinstance(piece, bytes):
            return piece_bytes(piece, self.form)
        text = texts.text(token)
        return None if "\ufffd" in text else text.encode()

    def spell(self, raw: bytes) -> tuple[int, ...]:
        """The tokens that write some bytes; those of U+FFFD where none do."""
        if raw in self.by_bytes:
            return (self._plainest(self.by_bytes[raw]),)
        merged = self._merged(raw)
        if merged and b"".join(self.bytes[token] or b"" for token in merged) == raw:
            return merged
        tokens: list[int] = []
        while raw:
            size = next((n for n in range(self.longest, 0, -1) if raw[:n] in self.by_bytes), 0)
            if not size:
                return self._unknown()
            tokens.append(self._plainest(self.by_bytes[raw[:size]]))
            raw = raw[size:]
        return tuple(tokens) or self._unknown()

    def _plainest(self, tokens: Sequence[int]) -> int:
        """Of tokens with the same bytes, one that is no byte token (`<0x41>`)."""
        return min(tokens, key=lambda token: (str(self.pieces[token]).startswith("<0x"), token))

    def _merged(self, raw: bytes) -> tuple[int, ...]:
        """The tokens that the tokenizer's own model (its merges) makes of some bytes."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None or not hasattr(core, "model"):
            return ()
        if self.form == BYTE_LEVEL:
            word = "".join(_CHAR_OF[byte] for byte in raw)
        else:
            try:
                word = raw.decode()
            except UnicodeDecodeError:
                return ()
            word = word.replace(" ", "▁") if self.form == BARS else word
        tokens = tuple(each.id for each in core.model.tokenize(word))
        return tokens if all(token < self.size for token in tokens) else ()

    def _unknown(self) -> tuple[int, ...]:
        """The tokens of the replacement character; the least token where it cannot be written."""
        ids = self.tokenizer("\ufffd", add_special_tokens=False)["input_ids"]
        return tuple(token for token in ids if token < self.size) or (0,)


def _form(tokenizer: Any) -> str:
    """How a tokenizer's pieces write bytes: `BYTE_LEVEL`, `BARS`, or "" for any other way."""
    if is_byte_level(tokenizer) or hasattr(tokenizer, "byte_decoder"):
        return BYTE_LEVEL
    core = getattr(tokenizer, "backend_tokenizer", None)
    told = "" if core is None else f"{core.decoder} {core.pre_tokenizer} {core.normalizer}"
    bars = "▁" in told or "Metaspace" in told or hasattr(tokenizer, "sp_model")
    return BARS if bars else ""


def piece_bytes(piece: str | bytes, form: str) -> bytes | None:
    """The bytes that a piece of a vocabulary writes; None where they are unknown.

    Args:
        piece: its name; tokenizers like tiktoken's name a token by its bytes.
        form: see `_form`.
    """
    if isinstance(piece, bytes):
        return piece
    if form == BYTE_LEVEL:
        try:
            return piece.translate(_TO_LATIN).encode("latin-1")
        except UnicodeEncodeError:  # not in the alphabet
            return None
    if form == BARS:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()
    return None


def make_translation(base: Tokens, own: Tokens, end: int | None) -> Translation:
    """The translation between the base's vocabulary and a member's.

    Args:
        base: the base's tokens.
        own: the member's.
        end: the base's end token that stands for all end tokens of the member; None for none.
    """
    sources = _sources(base, own, end)
    used = [token for each in sources.values() for token in each]
    source = torch.zeros(base.size, dtype=torch.long)
    for token, each in sources.items():
        source[token] = each[0]
    missing = [token for token in range(base.size) if token not in sources]
    every = {token for token, piece in enumerate(own.pieces) if piece is not None}
    lossy = bool(missing) or len(used) != len(set(used)) or set(used) != every
    read = _reader(base, own)
    return Translation(
        read=read,
        source=source,
        several={token: each for token, each in sources.items() if len(each) > 1},
        missing=missing,
        lossy=lossy,
        own_size=own.size,
        growth=_growth(base, read),
    )


def _sources(base: Tokens, own: Tokens, end: int | None) -> dict[int, list[int]]:
    """Id of the base -> the member's ids that write the same; ids without any are left out."""
    sources: dict[int, list[int]] = {}
    for token, raw in enumerate(base.bytes):
        each = own.by_bytes.get(raw, ()) if raw else ()
        # SentencePiece has two tokens for a byte (`A`, `<0x41>`): where both do, each has its own.
        same = [i for i in each if own.pieces[i] == base.pieces[token]]
        several = raw is not None and len(base.by_bytes.get(raw, ())) > 1
        if each:
            sources[token] = same if several and same else list(each)
    by_name = {text: token for token, text in own.added.items()}
    for token, text in base.added.items():
        if text in by_name:
            sources.setdefault(token, [by_name[text]])
    first = _first_of(base), _first_of(own)
    if first[0] is not None and first[1] is not None:
        sources.setdefault(first[0], [first[1]])
    _unite_ends(sources, base, own, end)
    return sources


def _first_of(tokens: Tokens) -> int | None:
    """The token before a text (BOS)."""
    token = tokens.tokenizer.bos_token_id
    return token if token is not None and token < tokens.size else None


def _unite_ends(sources: dict[int, list[int]], base: Tokens, own: Tokens, end: int | None) -> None:
    """Gives all end tokens of the member to the base's, in place.

    One that the base has by the same name, and ends with, stays with that; the others go to `end`.
    """
    if end is None or not own.ends:
        return
    named = {token for e in base.ends for token in sources.get(e, ()) if token in own.ends}
    for token in base.ends:
        sources[token] = [each for each in sources.get(token, ()) if each in named]
    sources[end] = [*sources.get(end, ()), *sorted(own.ends - named)]
    for token in base.ends:
        if not sources[token]:
            del sources[token]


def _reader(base: Tokens, own: Tokens) -> Any:
    """A token of the base -> the member's tokens of the same bytes; see `Translation.read`."""
    by_name = {text: token for token, text in own.added.items()}
    end = own.tokenizer.eos_token_id
    end = end if end is not None and end < own.size else min(own.ends, default=None)
    first = _first_of(own)
    first = end if first is None else first  # lm-eval begins a text by EOS, too

    @cache
    def read(token: int) -> tuple[int, ...]:
        raw = base.bytes[token]
        if raw:
            same = [i for i in own.by_bytes.get(raw, ()) if own.pieces[i] == base.pieces[token]]
            return tuple(same[:1]) or own.spell(raw)
        if base.added.get(token) in by_name:
            return (by_name[base.added[token]],)
        if token == _first_of(base) and first is not None:
            return (first,)
        if token in base.ends and end is not None:
            return (end,)
        return own.spell(base.added[token].encode()) if token in base.added else own._unknown()

    return read


def _growth(base: Tokens, read: Any) -> float:
    """The member's tokens per token of the base, over a sample of the base's ids."""
    ids = range(0, base.size, max(1, base.size // _SAMPLE))
    return sum(len(read(token)) for token in ids) / len(ids)


def counterparts(translation: Translation) -> Mapping[str, float]:
    """How many of the base's ids the member has, and their share."""
    size = len(translation.source)
    known = size - len(translation.missing)
    return {"ids": known, "share": known / size}
