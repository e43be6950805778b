"""Text and tokens: prompts, a growing completion with its stop strings, and single tokens."""

import logging
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from proxytune.engine.thought import ANSWER, Splitter, Thought

log = logging.getLogger(__name__)

# Decode these prompt tokens too; otherwise tokenizers drop the first generated token's space.
_CONTEXT = 8
_PENDING = 12  # tokens after which an incomplete character is shown as it is


class GrowingText:
    """The text of a completion that grows token by token, at constant cost per token.

    A token's text depends on its neighbours (a leading space, a character spread over several
    byte tokens). Therefore each new token is decoded together with the few tokens before it, and a
    text that ends in an incomplete character waits for the rest of that character.

    `push` and `finish` return the text in pieces. A piece holds only text that no later token can
    take away; together the pieces make up `text`.

    Args:
        tokenizer: decodes ids; None leaves the text empty.
        prompt_ids: the prompt; its last tokens are the context of the first generated one.
        stop: strings that end the text; of a text with a thought, its answer.
        thought: how the text thinks; None where it does not. A thought is in no piece.

    Attributes:
        cut: the offset in `raw` of the first stop string; None while there is none.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        thought: Thought | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._known = self._decode(self._ids)
        self._settled = len(self._ids)
        self._parts: list[str] = []
        self._stop = tuple(stop)
        self._reach = max(map(len, stop), default=1) - 1
        self._held = ""  # decoded, but not returned: a stop string may begin here
        self._returned = 0  # characters
        self._split = Splitter(thought) if thought is not None else None
        self._begin = 0  # the offset of the answer in `raw`
        self._length = 0  # of `raw`
        self.cut: int | None = None

    @property
    def phase(self) -> str:
        """Where the completion stands; see `engine.thought`."""
        return ANSWER if self._split is None else self._split.phase

    def push(self, token: int, ours: bool = False) -> str:
        """Adds a token; returns the text that became certain by it.

        Args:
            token: the token.
            ours: whether it stands between thought and answer, and belongs to neither.
        """
        tag = None if self._split is None else self._split.thought.tags.get(token)
        self._ids.append(token)
        text = self._decode(self._ids)
        if tag is not None and not text.endswith(tag) and self.phase != ANSWER:
            self._settle(text)  # decoding drops special tokens
            return self._release(self._take(tag))
        waiting = len(self._ids) - self._settled
        if text.endswith("\ufffd") and waiting < _PENDING:
            return ""
        return self._release(self._settle(text, ours))

    def finish(self) -> str:
        """Ends the text; returns the part that was still held back."""
        if len(self._ids) > self._settled:
            self._settle(self._decode(self._ids))
        if self._split is not None and self.phase != ANSWER:
            rest = self._split.finish()
            self._begin = self._length - len(rest)
            self._find(rest)
        return self._release(len(self._held))

    def begin(self) -> None:
        """Lets the answer begin, after the tokens between thought and answer."""
        assert self._split is not None
        self._split.begin()
        self._begin = self._length

    @property
    def raw(self) -> str:
        """All of the decoded text, nothing cut."""
        return "".join(self._parts)

    @property
    def text(self) -> str:
        """The text before the first stop string; of a text with a thought, its answer."""
        return "" if self.phase != ANSWER else self.raw[self._begin : self.cut]

    def _settle(self, text: str, ours: bool = False) -> int:
        """Takes what `text` adds to the known text; how many held characters are certain."""
        new = text[len(self._known) :]
        self._ids = self._ids[-_CONTEXT:]
        self._settled = len(self._ids)
        self._known = self._decode(self._ids)
        return self._take(new, ours)

    def _take(self, new: str, ours: bool = False) -> int:
        """Takes new text; how many held characters are certain."""
        self._parts.append(new)
        self._length += len(new)
        if self._split is not None and self.phase != ANSWER:
            new = self._split.push(new, ours)
            self._begin = self._length - len(new)
        self._find(new)
        return self._doubtful() if self.cut is None else len(self._held)

    def _find(self, new: str) -> None:
        """Adds to the held text, and cuts it at a stop string."""
        if self.cut is not None:
            return
        # A stop string that begins before `new` begins within the held text.
        self._held += new
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.cut = self._begin + self._returned + len(self._held)

    def _doubtful(self) -> int:
        """The offset in the held text from which later tokens may complete a stop string."""
        held = self._held
        starts = (
            at
            for at in range(max(0, len(held) - self._reach), len(held))
            if any(string.startswith(held[at:]) for string in self._stop)
        )
        return next(starts, len(held))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self._returned += count
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TokenTexts:
    """The text of each token of a vocabulary.

    A tokenizer may drop the space before a text's first token, so each token is decoded after
    another one. A token that is only a part of a character shows as U+FFFD.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._special = set(tokenizer.all_special_ids)
        self._byte_level = is_byte_level(tokenizer)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before = self._decode(self._anchor)

    def text(self, token: int) -> str:
        """The text that a token adds to the text before it; a special token's is its name."""
        if token not in self._texts:
            self._texts[token] = self._decode([*self._anchor, token])[len(self._before) :]
        return self._texts[token]

    def shown(self, token: int) -> str:
        """The text that a token adds to a completion: as `text`, but "" for a special token."""
        return "" if token in self._special else self.text(token)

    def bytes(self, token: int) -> list[int]:
        """The bytes of a token, even if it holds only a part of a character."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token not in self._special and isinstance(name, str):
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
            if byte:
                return [int(byte[1], 16)]
            if self._byte_level and name and set(name) <= BYTE_OF.keys():
                return [BYTE_OF[char] for char in name]
        return list(self.text(token).encode())

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer writes its pieces in the 256 visible characters of byte-level BPE."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core is not None and "ByteLevel" in str(core.decoder)


def _byte_characters() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2).

    A visible byte is written as itself, the others as the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_OF = _byte_characters()


def encoded(text: str, tokenizer: Any, special: bool = True) -> list[int]:
    """The token ids of a text that a model is to continue.

    Tokens that the tokenizer adds after a text (an end token, a separator) are cut, with one
    warning for each tokenizer: after them a model begins another text.

    Args:
        text: what the model reads.
        tokenizer: the model's.
        special: whether the tokenizer adds its special tokens; only its first ones stay.
    """
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    added = _added_after(tokenizer) if special else []
    return ids[: -len(added)] if added and ids[-len(added) :] == added else ids


_added: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # tokenizer -> what it adds


def _added_after(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer adds after every text; the first call warns of them."""
    if tokenizer not in _added:
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(tokenizer("a")["input_ids"])
        after = whole[::-1].index(plain[-1]) if plain and plain[-1] in whole else 0
        _added[tokenizer] = whole[len(whole) - after :]
        if after:
            log.warning(
                "the tokenizer of %s adds %s at the end of a prompt; it is cut, for a model would "
                "begin another text after it",
                getattr(tokenizer, "name_or_path", "") or "a model",
                " ".join(tokenizer.convert_ids_to_tokens(_added[tokenizer])),
            )
    return _added[tokenizer]
