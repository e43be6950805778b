"""Thoughts: where a completion's thought ends and its answer begins, and how a budget ends it.

A model that thinks writes a thought between two tags (`<think>`, `</think>`) before its answer. Its
prompt may open the thought. Stop strings, bans and choices of a task are about the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxytune.errors import UserError

# Where a completion stands. BEFORE: its first characters may still become the opening tag.
# AFTER: the thought has ended, and nothing of the answer is written yet. FIRST: our text after the
# thought is written, and the answer begins with whatever comes.
BEFORE, INSIDE, AFTER, FIRST, ANSWER = "before", "inside", "after", "first", "answer"


@dataclass(frozen=True)
class Thought:
    """How the completions of one prompt think.

    Attributes:
        start, end: the tags.
        opened: whether the prompt ends within a thought.
        closing: the tokens of `end`, which end a thought whose budget is spent.
        after: the tokens that are written after a thought, before the answer ("Answer:").
        instead: the token that takes the place of an `end` that comes too early ("Wait").
        tags: token -> tag, for tags that are one token; decoding may drop these.
        prefix: the text of `after`.
    """

    start: str
    end: str
    opened: bool = False
    closing: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    instead: int | None = None
    tags: Mapping[int, str] = field(default_factory=dict)
    prefix: str = ""


def thought_of(
    start: str, end: str, tokenizer: Any, *, opened: bool, prefix: str, word: str | None
) -> Thought:
    """The `Thought` of a prompt.

    Args:
        start, end: the tags.
        tokenizer: of the member that thinks.
        opened: whether its prompt ends within a thought.
        prefix: text between thought and answer.
        word: takes the place of an `end` that comes too early; None for nothing.

    Raises:
        UserError: there is a word, and it or `end` is not one token.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    single = {ids(tag)[0]: tag for tag in (start, end) if len(ids(tag)) == 1}
    after = f"\n\n{prefix}" if prefix else ""
    for text in (end, word) if word is not None else ():
        if len(ids(text)) != 1:
            raise UserError(
                f"think_least replaces the token of {end!r} by that of {word!r}: {text!r} is "
                f"{len(ids(text))} tokens"
            )
    instead = None if word is None else ids(word)[0]
    return Thought(start, end, opened, ids(end), ids(after), instead, single, prefix)


class Splitter:
    """Tells the answer's text from the thought's, piece by piece.

    Attributes:
        thought: the tags.
        phase: BEFORE, INSIDE, AFTER, FIRST or ANSWER.
    """

    def __init__(self, thought: Thought) -> None:
        self.thought = thought
        self.phase = INSIDE if thought.opened else BEFORE
        self._held = ""  # undecided, or the beginning of the closing tag

    def push(self, piece: str, ours: bool = False) -> str:
        """Takes further text of the completion; returns what of it belongs to the answer.

        Args:
            piece: the text.
            ours: whether it is of tokens that stand between thought and answer.
        """
        if self.phase == ANSWER:
            return piece
        if self.phase == FIRST:
            return self._answer(piece) if piece else ""
        if ours:
            return ""
        self._held += piece
        if self.phase == BEFORE:
            text = self._held.lstrip()
            if not text.startswith(self.thought.start):
                if self.thought.start.startswith(text):
                    return ""
                return self._answer(self._held)
            self.phase, self._held = INSIDE, text[len(self.thought.start) :]
        if self.phase == INSIDE:
            at = self._held.find(self.thought.end)
            if at < 0:
                self._held = (
                    self._held[-len(self.thought.end) + 1 :] if self.thought.end[1:] else ""
                )
                return ""
            self.phase, self._held = AFTER, self._held[at + len(self.thought.end) :]
        if self.thought.after:  # nothing that the model wrote before our text is of the answer
            return ""
        text = self._held.lstrip()
        return self._answer(text) if text else ""

    def begin(self) -> None:
        """Lets the answer begin: our text after the thought is written."""
        self.phase, self._held = FIRST, ""

    def finish(self) -> str:
        """Ends the text; returns what turns out to be of the answer: text that began no thought."""
        return self._answer(self._held) if self.phase == BEFORE else ""

    def _answer(self, text: str) -> str:
        self.phase, self._held = ANSWER, ""
        return text
