"""A text that is far too long is refused before it is encoded, and no text that fits is.

`exceeds` is new: on 538a493 a prompt of 3 MB took seconds to be refused.
"""

import random
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from proxytune.engine.text import BYTE_OF
from proxytune.files import ROOT
from proxytune.loading.length import bytes_per_token, exceeds

MOST = 40
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_level(normalizer=None, **added) -> PreTrainedTokenizerFast:
    words = [*BYTE_OF, "\u0120\u0120", "\u0120\u0120\u0120\u0120", "aa", "aaaa"]
    merges = [("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120"), ("a", "a"), ("aa", "aa")]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.normalizer = normalizer
    if added:
        core.add_tokens([AddedToken("<mask>", **added)])
    return wrapped(core)


def sentencepiece(fallback: bool = True) -> PreTrainedTokenizerFast:
    words = [*BYTES, "\u2581", "\u2581\u2581", "a", "aa", "<unk>"]
    merges = [("\u2581", "\u2581"), ("a", "a")]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return wrapped(core)


def words(split) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = split
    return wrapped(core)


TOKENIZERS = {
    "pocket": lambda: AutoTokenizer.from_pretrained(ROOT / "pocket" / "models" / "base"),
    "byte level": byte_level,
    "byte level, NFC": lambda: byte_level(normalizers.NFC()),
    "lowered": lambda: byte_level(normalizers.Lowercase()),
    "stripped": lambda: byte_level(normalizers.Strip()),
    "shortened": lambda: byte_level(normalizers.Replace(Regex(" +"), " ")),
    "takes spaces": lambda: byte_level(lstrip=True),
    "sentencepiece": sentencepiece,
    "one unknown for many": lambda: sentencepiece(fallback=False),
    "words": lambda: words(pre_tokenizers.WhitespaceSplit()),
    "words and spaces": lambda: words(
        pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s?\S+|\s+"), "isolated")
    ),
}
PIECES = [
    "a", "aaaa", " ", "    ", "\n", "b a ", "z" * 50, "\u2581" * 9, "\u20ac", "\U0001f600",
    "<mask>", "\u1112\u1161\u11ab", "\u212a", "e\u0301", "K\u0327", " <mask>",
    "\u3000", "it's", "12",
]  # fmt: skip


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_that_fits_is_refused(name):
    tokenizer = TOKENIZERS[name]()
    choose = random.Random(3)
    refused = 0
    for _ in range(100):
        few = choose.sample(PIECES, choose.randint(1, 3))
        text = "".join(choose.choice(few) for _ in range(choose.choice((30, 200, 1000))))
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if exceeds(text, tokenizer, MOST):
            refused += 1
            assert count > MOST, (name, few, len(text))
    # one that drops what it does not know has nothing to count
    assert refused > 5 or name == "one unknown for many"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("piece", PIECES)
def test_long_runs_of_one_piece(name, piece):
    tokenizer = TOKENIZERS[name]()
    text = piece * (20_000 // len(piece))
    if exceeds(text, tokenizer, MOST):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > MOST


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("byte level", 4),
        ("byte level, NFC", 16),
        ("sentencepiece", 6),
        ("pocket", None),
        ("lowered", None),
        ("stripped", None),
        ("shortened", None),
        ("takes spaces", None),
        ("one unknown for many", None),
        ("words", None),
    ],
)
def test_the_longest_token_is_known_or_not(name, longest):
    assert bytes_per_token(TOKENIZERS[name]()) == longest


@pytest.mark.slow
def test_canonical_forms_shorten_a_text_less_than_fourfold():
    def size(text: str) -> int:
        return len(text.encode())

    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    longest: dict[str, int] = {}  # a character -> the most bytes that become it alone
    for each in characters:
        form = unicodedata.normalize("NFD", each)
        if len(form) == 1:
            longest[form] = max(longest.get(form, 0), size(each))
    ratios = []
    for each in characters:
        composed = unicodedata.normalize("NFC", each)
        parts = unicodedata.normalize("NFD", each)
        ratios.append(sum(longest.get(part, size(part)) for part in parts) / size(composed))
    assert max(ratios) == 3.5


def test_a_text_of_megabytes_is_not_read_whole():
    tokenizer = TOKENIZERS["pocket"]()
    read = []
    call = type(tokenizer).__call__

    class Counting(type(tokenizer)):
        def __call__(self, text, **settings):
            read.append(len(text))
            return call(self, text, **settings)

    tokenizer.__class__ = Counting
    assert exceeds("abc " * 750_000, tokenizer, 512)
    assert sum(read) < 50_000
