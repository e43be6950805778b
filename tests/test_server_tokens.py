"""Tokens as text and bytes, for both kinds of vocabulary."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxytune.engine.text import TokenTexts
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
