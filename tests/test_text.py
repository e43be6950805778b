"""The text of a growing completion: its pieces, and what a stop string holds back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.engine.text import GrowingText


class Words:
    """A tokenizer whose token i writes the i-th of some strings."""

    def __init__(self, words):
        self.words = words

    def decode(self, ids, **_):
        return "".join(self.words[token] for token in ids)


def grown(stop, words):
    """Writes words one after another until a stop string appears, as a row does.

    Returns:
        The growing text, and the piece that each word (and then the end) brought.
    """
    text = GrowingText(Words(words), [], stop)
    pieces = []
    for token in range(len(words)):
        pieces.append(text.push(token))
        if text.cut is not None:
            break
    return text, [*pieces, text.finish()]


@pytest.mark.parametrize(
    ("stop", "words", "pieces"),
    [
        ([], ["ab", "c"], ["ab", "c", ""]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""]),
        (["bc"], ["a", "b", "c"], ["a", "", "", ""]),
        (["bc", "bd"], ["ab", "b", "e"], ["a", "b", "be", ""]),
        (["abc"], ["ab", "ab", "c!"], ["", "ab", "", ""]),
        (["x"], ["abxcd"], ["ab", ""]),
        (["abcd", "bc"], ["ab", "c"], ["", "a", ""]),
        (["\n\n"], ["a\n"], ["a", "\n"]),
    ],
)
def test_a_possible_beginning_of_a_stop_string_is_held_back(stop, words, pieces):
    assert grown(stop, words)[1] == pieces


@settings(deadline=None)
@given(
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    words=st.lists(st.text("ab\nc", max_size=4), max_size=12),
)
def test_pieces_make_up_the_text_and_come_as_early_as_they_can(stop, words):
    text, pieces = grown(stop, words)
    assert "".join(pieces) == text.text
    written = len(pieces) - 1  # words, before the end
    whole = "".join(words[:written])
    assert text.raw == whole
    ends = [whole.find(string) for string in stop if string in whole]
    assert text.text == whole[: min(ends, default=None)]
    for count in range(1, written + (text.cut is None)):
        shown = "".join(pieces[:count])
        held = "".join(words[:count])[len(shown) :]
        if held:  # a next word can end the completion right before it
            rest = next(s.removeprefix(held) for s in stop if s.startswith(held))
            assert grown(stop, [*words[:count], rest])[0].text == shown
