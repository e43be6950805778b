"""Members whose tokens are not the base's: `vocabulary=map`.

None of this could be done on 538a493: every test here fails on it, for `load` knew no vocabulary.
"""

import math
import pickle

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import proxytune
from proxytune.errors import UserError
from proxytune.experiment.ranks import RanksGenerator
from proxytune.experiment.replicas import Replica
from proxytune.formula import contrastive
from proxytune.loading.formulas import settle
from proxytune.loading.translation import Tokens, make_translation, piece_bytes
from proxytune.loading.vocabulary import common_vocabulary, settle_vocabulary
from proxytune.members.choose import make_member
from proxytune.members.translated import TranslatedMember
from proxytune.proxy import combine_logits
from proxytune.records import make_decoding
from tests.tiny import tiny_tokenizer
from tests.vocabularies import (
    TEXTS,
    TOKENIZER,
    loaded,
    permutation,
    permuted,
    permuted_model,
    renamed_words,
    triple,
)

EOS = 2


@pytest.mark.thinned(1)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_a_permuted_vocabulary_is_the_strict_one(arch):
    members, new = triple(arch), permutation(300)
    other = permuted(TOKENIZER, new)
    moved = [members[0], *(permuted_model(m, new) for m in members[1:])]
    want = proxytune.load(*members, alpha=0.7, tokenizer=TOKENIZER)
    got = loaded(moved, [TOKENIZER, other, other], vocabulary="map")
    assert got.vocabulary.translations.keys() == {"expert", "antiexpert"}
    assert got.vocabulary.unshifted == {}
    ways = ({}, {"speculative": 3}, {"batch_size": 1}, {"temperature": 1.0, "n": 2})
    for more in ways:
        one, two = (each.generate(TEXTS, max_new_tokens=16, **more) for each in (got, want))
        assert one == two
    ids = want.encode(TEXTS[1])["base"]
    assert torch.equal(got.logits(ids), want.logits(ids))
    pairs = [(TEXTS[0], [40, 41, 42]), (TEXTS[1], [60])]
    assert got.loglikelihood(pairs) == want.loglikelihood(pairs)


def test_the_identity_is_the_strict_vocabulary_bit_for_bit():
    """Also through a `TranslatedMember`, which `load` leaves out where the tokens are the same."""
    members = triple()
    want = proxytune.load(*members, alpha=0.7, tokenizer=TOKENIZER)
    got = proxytune.load(*members, alpha=0.7, tokenizer=TOKENIZER, vocabulary="map")
    ids = [[1, 40, 41, 42], [1, 60, 61]]
    assert got.vocabulary.translations == {}
    assert torch.equal(got.logits(ids[0]), want.logits(ids[0]))
    tokens = Tokens(TOKENIZER, 300, [EOS])
    plain, inner = (make_member(members[1], 300) for _ in range(2))
    translated = TranslatedMember(inner, make_translation(tokens, tokens, EOS))
    block = torch.tensor([[50, 51], [52, 53]])
    with torch.inference_mode():
        for member in (plain, translated):
            member.passes = [member.prefill(ids).logits, member.extend(block).logits]
            member.rollback([1, 2])
            member.keep([1, 0, 0])
            member.passes.append(member.step(torch.tensor([7, 8, 9])).logits)
    assert all(map(torch.equal, plain.passes, translated.passes))
    assert plain.lengths == translated.lengths == [4, 6, 6]


# A vocabulary with fewer merges: some of the base's tokens are several of the helpers'.
SMALL = tiny_tokenizer(275)


class SlowMap:
    """`vocabulary=map` in float64: every helper reads everything again for every token."""

    def __init__(self, members) -> None:
        self.members = members
        self.own = SMALL.get_vocab()
        words = {i: word for word, i in TOKENIZER.get_vocab().items()}
        self.words = [words[i] for i in range(300)]
        self.known = [i for i in range(300) if self.words[i] in self.own]

    def read(self, token: int) -> list[int]:
        word = self.words[token]
        if word in self.own:
            return [self.own[word]]
        if word.startswith("<extra"):
            return SMALL(word)["input_ids"]
        return [each.id for each in SMALL.backend_tokenizer.model.tokenize(word)]

    def logits(self, base_ids, own_ids):
        with torch.inference_mode():
            base = self.members[0](torch.tensor([base_ids])).logits[0, -1].double()
            out, shares = base.clone(), []
            logs = []
            for member in self.members[1:]:
                log = member(torch.tensor([own_ids])).logits[0, -1, :275].double().log_softmax(-1)
                logs.append(log[[self.own[self.words[i]] for i in self.known]])
                shares.append(1 - float(logs[-1].exp().sum()))
            out[self.known] += 0.7 * (logs[0] - logs[1])
        return out, shares

    def greedy(self, text: str, count: int):
        base, own, out, seen = TOKENIZER(text)["input_ids"], SMALL(text)["input_ids"], [], []
        while len(out) < count:
            logits, shares = self.logits(base, own)
            seen.append(shares)
            token = int(logits.argmax())
            if token == EOS:
                break
            out.append(token)
            base, own = [*base, token], [*own, *self.read(token)]
        return out, [sum(each) / len(each) for each in zip(*seen, strict=True)]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_another_vocabulary_equals_brute_force(arch):
    members = triple(arch, vocab=280)
    slow = SlowMap(members)
    assert 250 < len(slow.known) < 290
    assert max(len(slow.read(i)) for i in range(290)) > 1
    got = loaded(members, [TOKENIZER, SMALL, SMALL], vocabulary="map")
    want = [slow.greedy(text, 14) for text in TEXTS]
    for speculative, batch_size in ((False, 3), (3, 2), ("auto", 1)):
        done = got.generate(
            TEXTS, max_new_tokens=14, speculative=speculative, batch_size=batch_size
        )
        assert [each.token_ids for each in done] == [tokens for tokens, _ in want]
        for each, (_, shares) in zip(done, want, strict=True):
            told = each.extra["unshifted"]
            assert [told["expert"], told["antiexpert"]] == pytest.approx(shares, abs=1e-4)
    ids = TOKENIZER(TEXTS[1])["input_ids"]
    own = [each for token in ids for each in slow.read(token)]
    assert torch.allclose(got.logits(ids)[-1].double(), slow.logits(ids, own)[0], atol=1e-3)


def test_sampled_tokens_of_another_vocabulary_follow_the_formula():
    """A chi-square test of the first token, over 3,000 samples; sure beforehand, as seeds are."""
    members = triple(vocab=280)
    base, own = (each(TEXTS[0])["input_ids"] for each in (TOKENIZER, SMALL))
    want = SlowMap(members).logits(base, own)[0].softmax(-1)
    got = loaded(members, [TOKENIZER, SMALL, SMALL], vocabulary="map")
    counts = torch.zeros(300, dtype=torch.double)
    for each in got.generate(TEXTS[:1], max_new_tokens=1, temperature=1.0, n=3000):
        counts[each.token_ids[0] if each.token_ids else EOS] += 1
    often = want * 3000 >= 5
    chi = (((counts - 3000 * want) ** 2) / (3000 * want))[often].sum().item()
    free = int(often.sum())
    assert chi < free + 4 * math.sqrt(2 * free)


def test_rows_that_pause_and_are_read_again_keep_their_texts():
    got = loaded(triple(vocab=280), [TOKENIZER, SMALL, SMALL], vocabulary="map")
    want = [each.token_ids for each in got.generate(TEXTS, max_new_tokens=14)]
    decoding = make_decoding(max_new_tokens=14)
    loop, done = got.loop(speculative=False), []
    for request in got.requests(TEXTS, decoding):
        loop.add(request)
    for step in range(60):
        if step == 5:
            loop.pause([0, 2])
        if step == 8:
            loop.resume([0, 2])
        done += loop.step()
    assert [f.token_ids for f in sorted(done, key=lambda f: f.index)] == want


def test_ranks_and_replicas_read_prompts_as_one_process_does():
    special = loaded(triple(), [TOKENIZER] * 3, vocabulary="special")
    facts = pickle.loads(pickle.dumps(Replica.describe(special)))  # as Ray sends them
    assert facts.vocabulary == special.vocabulary
    got = loaded(triple(vocab=280), [TOKENIZER, SMALL, SMALL], vocabulary="map")
    ranked = RanksGenerator.of(got)
    assert ranked.vocabulary is got.vocabulary
    for text in TEXTS:
        assert ranked.encode(text) == got.encode(text)
        assert got.encode(text)["expert"] != got.encode(text)["base"]


@pytest.mark.slow
def test_a_row_ends_where_the_context_of_a_helper_does():
    """Its tokens are more than the base's, so that no limit on the base's foresees it."""
    members = triple(vocab=280)
    for member in members[1:]:
        member.config.max_position_embeddings = 40
    got = loaded(members, [TOKENIZER, SMALL, SMALL], vocabulary="map")
    settings = {"max_new_tokens": 100, "ignore_eos": True}
    want = got.generate(TEXTS, **settings, speculative=False)
    assert {each.finish_reason for each in want} == {"length"}
    read = got.vocabulary.translations["expert"].read
    ended_by_helpers = 0
    for text, each in zip(TEXTS, want, strict=True):
        lengths = [len(tokenizer(text)["input_ids"]) for tokenizer in (TOKENIZER, SMALL)]
        grown = lengths[1] + sum(len(read(token)) for token in each.token_ids)
        assert grown - len(read(each.token_ids[-1])) <= 40
        ended_by_helpers += grown > 40
        assert grown > 40 or max(lengths) + len(each.token_ids) == 40
    assert ended_by_helpers
    for more in ({"speculative": 4}, {"batch_size": 1}):
        assert got.generate(TEXTS, **settings, **more) == want
    with pytest.raises(UserError, match="the models read at most 40"):
        got.loglikelihood([(TEXTS[0], list(range(200, 230)) * 2)])


def test_an_expert_of_another_vocabulary_beside_an_antiexpert_of_the_bases():
    """Ids that the expert lacks get no shift, although the antiexpert has them."""
    members = [*triple(vocab=280)[:2], triple()[2]]
    got = loaded(members, [TOKENIZER, SMALL, TOKENIZER], vocabulary="map")
    assert got.vocabulary.translations.keys() == {"expert"}
    ids = [1, 40, 41]
    missing = list(got.vocabulary.unshifted["antiexpert"])
    assert missing == list(got.vocabulary.unshifted["expert"])
    base = proxytune.load(members[0], tokenizer=TOKENIZER).logits(ids)
    assert torch.equal(got.logits(ids)[:, missing], base[:, missing])


@pytest.mark.parametrize(
    ("piece", "form", "raw"),
    [
        ("Ġthe", "byte_level", b" the"),
        ("âĢ", "byte_level", b"\xe2\x80"),
        ("日", "byte_level", None),
        ("▁the", "bars", b" the"),
        ("<0xE2>", "bars", b"\xe2"),
        ("é", "bars", "é".encode()),
        (b"\xe2\x80", "", b"\xe2\x80"),
        (" the", "", None),
    ],
)
def test_the_bytes_of_a_piece(piece, form, raw):
    assert piece_bytes(piece, form) == raw


def bars():
    """A tokenizer like Llama-2's: bars for spaces, a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "d", "▁a"]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_byte_level_and_sentencepiece_meet_in_their_bytes():
    base, own = Tokens(TOKENIZER, 300, [2]), Tokens(bars(), 263, [2])
    there, back = make_translation(base, own, 2), make_translation(own, base, 2)
    ids = TOKENIZER.get_vocab()
    assert there.several[ids["a"]] == [3 + ord("a"), 260]  # <0x61> and a
    assert there.several[ids["Ġ"]] == [3 + ord(" "), 259]
    assert there.read(ids["a"]) == (260,)
    assert there.read(ids["â"]) == (3 + 0xE2,)  # a part of a character
    assert there.source[2] == 2 and there.source[1] == 1
    assert there.read(ids["<pad>"]) == own.spell(b"<pad>")
    assert back.read(262) == tuple(TOKENIZER(" a", add_special_tokens=False)["input_ids"])
    assert back.source[3 + ord("a")] == back.source[260] == ids["a"]
    same = make_translation(own, own, 2)
    assert not same.lossy and not same.several and same.source.tolist() == list(range(263))


def test_a_token_of_unknown_bytes_is_unmapped_and_reads_as_the_replacement_character():
    odd = renamed_words({"!": "日"})  # no letter of byte-level BPE
    base, own = Tokens(odd, 300, [2]), Tokens(TOKENIZER, 300, [2])
    found = make_translation(base, own, 2)
    assert odd.get_vocab()["日"] in found.missing
    want = TOKENIZER("\ufffd", add_special_tokens=False)["input_ids"]
    assert list(found.read(odd.get_vocab()["日"])) == want


def test_all_ends_of_a_helper_are_the_bases_end():
    base = Tokens(TOKENIZER, 300, [2])
    found = make_translation(base, Tokens(SMALL, 275, [2, 270, 271]), 2)
    assert found.several == {2: [2, 270, 271]}
    logits = torch.randn(1, 275)
    want = logits[0].log_softmax(-1)[[2, 270, 271]].exp().sum().log()
    assert float(found.logits(logits)[0, 2]) == pytest.approx(float(want), abs=1e-5)


def test_two_vocabularies_without_a_common_token_are_refused():
    core = Tokenizer(models.WordLevel({"<u>": 0, "日": 1, "本": 2}, unk_token="<u>"))
    core.decoder = decoders.Fuse()
    other = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>")
    with pytest.raises(UserError, match="no token of the expert writes the bytes"):
        common_vocabulary({"base": TOKENIZER, "expert": other}, {}, "map")
    with pytest.raises(UserError, match="the expert has none"):
        common_vocabulary({"base": TOKENIZER, "expert": None}, {}, "map")


def test_a_map_of_equal_vocabularies_has_nothing_to_say():
    tokenizers = dict.fromkeys(("base", "expert", "antiexpert"), TOKENIZER)
    ends = {role: {2} for role in tokenizers}
    for kind in ("strict", "special", "map"):
        found = settle_vocabulary(kind, tokenizers, dict.fromkeys(tokenizers, 300), ends)
        assert found.to_dict() is None and found.in_words() is None and found.unshifted == {}


def test_a_base_that_lists_few_tokens_takes_formulas_that_add_to_it():
    """Bounds of the base's logits bound no helper that agrees with the base about a token."""
    settle(combine_logits, 1.0, ["expert", "antiexpert"], few=True, vocabulary="map")
    with pytest.raises(UserError, match="contrastive with vocabulary=special needs every logit"):
        settle(contrastive, 1.0, ["antiexpert"], few=True, vocabulary="special")
    settle(contrastive, 1.0, ["antiexpert"], few=True)
