"""Tokens as text and bytes, for both kinds of vocabulary; text held back before a stop string."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxytune.engine.text import TokenTexts
from proxytune.server.answers import ShownText
from tests.tiny import sentencepiece_decoder, tiny_tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: words begin with U+2581, and what is no word is written byte by byte."""
    words = ["<unk>", "</s>", "\u2581a", "\u2581Paris", "s", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = sentencepiece_decoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def test_a_leading_space_belongs_to_its_token():
    texts = TokenTexts(sentencepiece_tokenizer())
    assert [texts.text(token) for token in (3, 4, 1)] == [" Paris", "s", "</s>"]
    assert [texts.shown(token) for token in (3, 4, 1)] == [" Paris", "s", ""]


def test_parts_of_a_character_have_their_bytes():
    texts = TokenTexts(sentencepiece_tokenizer())
    assert texts.bytes(5 + 0xC3) == [0xC3]
    assert bytes(texts.bytes(5 + 0xC3) + texts.bytes(5 + 0xA9)).decode() == "\u00e9"
    assert bytes(texts.bytes(3)) == b" Paris"
    assert bytes(texts.bytes(1)) == b"</s>"


def test_byte_level_tokens_have_their_bytes():
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    text = "na\u00efve \u2603 clips\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(bytes(texts.bytes(token)) for token in ids) == text.encode()


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        ([], ["ab", "c"], ["ab", "c"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["bc"], ["a", "b", "c"], ["a", "", ""]),
        (["bc", "bd"], ["ab", "b", "e"], ["a", "b", "be"]),
        (["abc"], ["ab", "ab", "c!"], ["", "ab", ""]),
        (["x"], ["abxcd"], ["ab"]),
    ],
)
def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(stop, pieces, shown):
    text = ShownText(stop)
    assert [text.push(piece) for piece in pieces] == shown


def test_the_end_of_a_text_brings_what_was_held_back():
    text = ShownText(["\n\n"])
    assert text.push("a\n") == "a"
    assert text.finish("a\n") == "\n"
