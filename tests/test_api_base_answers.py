"""Names of tokens, bounds, the store, and the proof that a choice is certain."""

import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from proxytune.engine.penalties import History
from proxytune.engine.sampling import NOTHING, Sampler
from proxytune.members.api.answer import Answer, make_answer
from proxytune.members.api.member import MAX_WIDTH, RequestPace
from proxytune.members.api.names import Named, TokenNames
from proxytune.members.api.store import Store
from proxytune.records import Decoding
from tests.tiny import sentencepiece_decoder, tiny_tokenizer

TINY = TokenNames(tiny_tokenizer(), 300)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces as Llama-2 writes them: a bar for the space, and byte tokens."""
    pieces = ["<s>", "</s>", "<0x41>", "▁A", "A", "▁the", "the", "▁", "<0xE2>", "<0x80>"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.decoder = sentencepiece_decoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


LLAMA = TokenNames(sentencepiece(), 10)


def name(text: str, **more) -> Named:
    return Named(-1.0, text, **more)


@pytest.mark.parametrize(
    ("names", "named", "ids"),
    [
        (TINY, name("token_id:7"), (7,)),
        (TINY, name("token_id:300"), ()),  # padding of the logits
        (TINY, name("", id=9), (9,)),
        (TINY, name("</s>"), (2,)),
        (TINY, name("no such token"), ()),
        (LLAMA, name("the"), (5, 6)),  # "▁the" decodes to "the", too
        (LLAMA, name("▁the"), (5,)),
        (LLAMA, name(" the", bytes=list(b" the")), (5,)),
        (LLAMA, name("A", bytes=list(b"A")), (2, 4)),  # the letter, or its byte
        (LLAMA, name("bytes:\\xe2"), (8,)),
        (LLAMA, name("</s>", bytes=list(b"</s>")), (1,)),
    ],
)
def test_a_name_has_the_ids_that_it_may_stand_for(names, named, ids):
    assert names.ids(named) == ids


def test_broken_characters_are_ambiguous_unless_bytes_say_which():
    assert len(TINY.ids(name("\ufffd"))) > 50
    token = TINY.ids(name("bytes:\\xe2"))
    assert len(token) == 1
    assert TINY.ids(name("\ufffd", bytes=[0xE2])) == token


def test_foreign_words_are_the_token_behind_a_space():
    foreign = TokenNames(sentencepiece(), 10, foreign=True)
    assert [foreign.ids(name(text)) for text in ("A", " A", "the", "B")] == [(3,), (3,), (5,), ()]
    words = [Named(math.log(0.5), "A"), Named(math.log(0.25), " A"), Named(math.log(0.1), "No")]
    answer = make_answer(words, foreign, 3)
    assert answer.ids.tolist() == [3]
    assert math.exp(answer.logprobs[0]) == pytest.approx(0.75)
    assert answer.unseen == pytest.approx(0.25)
    assert math.exp(answer.bound) == pytest.approx(0.25, abs=1e-4)  # "No" may be any other token


def test_an_ambiguous_name_is_no_candidate_and_bounds_what_it_may_be():
    listed = [Named(math.log(0.6), "the"), Named(math.log(0.3), "▁A")]
    answer = make_answer(listed, LLAMA, 2)
    assert answer.ids.tolist() == [3]
    assert answer.doubtful.tolist() == [5, 6]
    assert math.exp(answer.doubtful_bound) == pytest.approx(0.7, abs=1e-4)
    assert math.exp(answer.bound) == pytest.approx(0.3, abs=1e-4)
    ceiling = answer.ceiling(10).exp()
    assert ceiling[5].item() == ceiling[6].item() == pytest.approx(0.7, abs=1e-4)
    assert answer.logits(10)[5] == -torch.inf


def listed_from(logits: torch.Tensor, k: int, extra: int | None) -> list[Named]:
    logprobs = logits.log_softmax(-1)
    ids = logprobs.topk(k).indices.tolist() if k > 0 else list(range(len(logits)))
    ids += [extra] if extra is not None and extra not in ids else []
    random.Random(0).shuffle(ids)
    return [Named(float(logprobs[i]), f"token_id:{i}") for i in ids]


@pytest.mark.parametrize("k", [1, 3, 20, -1])
def test_bounds_hold_and_survive_the_store(k, tmp_path):
    store = Store(tmp_path / "a.sqlite", "m")
    for seed in range(30):
        logits = 3 * torch.randn(300, generator=torch.Generator().manual_seed(seed))
        answer = make_answer(listed_from(logits, k, extra=seed), TINY, k)
        store.put([1, 2, seed], 2, [answer])
        (again,) = store.get([1, 2, seed], 2)
        assert again is not None
        truth = logits.log_softmax(-1)
        assert len(again.ids) == (k if k > 0 else 300)
        assert torch.all(again.ceiling(300) >= truth - 1e-6)
        known = again.logits(300)
        assert torch.equal(known[again.ids], truth[again.ids])
        assert again.unseen == pytest.approx(float(1 - truth[again.ids].exp().sum()), abs=1e-5)
        assert np.array_equal(again.ids, answer.ids)
    assert store.get([1, 2, 99], 2) == [None]


def test_answers_of_another_model_or_another_prefix_are_not_found(tmp_path):
    answer = make_answer(listed_from(torch.randn(300), 5, None), TINY, 5)
    store = Store(tmp_path / "a.sqlite", "one")
    store.put([1, 2, 3, 4], 1, [answer] * 3)
    assert all(isinstance(each, Answer) for each in store.get([1, 2, 3, 4], 1))
    assert isinstance(store.get([1, 2], 1)[0], Answer)
    assert store.get([9, 2, 3, 4], 1) == [None] * 3
    assert store.get([1, 2, 3, 4], 0)[0] is None
    assert Store(tmp_path / "a.sqlite", "other").get([1, 2], 1) == [None]
    assert store.add("spent", {"requests": 2}) == {"requests": 2}
    assert Store(tmp_path / "a.sqlite", "other").add("spent", {"requests": 1}) == {"requests": 3}


def test_memory_alone_keeps_the_latest_answers(monkeypatch):
    monkeypatch.setattr("proxytune.members.api.store._KEPT_IN_MEMORY", 3)
    answer = make_answer(listed_from(torch.randn(300), 5, None), TINY, 5)
    store = Store(None, "m")
    for token in range(6):
        store.put([token], 0, [answer])
    assert [store.get([token], 0)[0] is not None for token in range(6)] == [False] * 3 + [True] * 3


SAMPLERS = {
    "greedy": Sampler(Decoding(max_new_tokens=1)),
    "banned": Sampler(Decoding(max_new_tokens=1), banned=range(100)),
    "choices": Sampler(Decoding(max_new_tokens=1), choices=[5, 50, 150, 250]),
    "temperature": Sampler(Decoding(max_new_tokens=1, temperature=0.7)),
    "top_k": Sampler(Decoding(max_new_tokens=1, temperature=1.0, top_k=4)),
    "top_p": Sampler(Decoding(max_new_tokens=1, temperature=1.0, top_p=0.8)),
    "min_p": Sampler(Decoding(max_new_tokens=1, temperature=1.0, min_p=0.2)),
    "presence": Sampler(Decoding(max_new_tokens=1, presence_penalty=2.0)),
    "frequency": Sampler(
        Decoding(max_new_tokens=1, temperature=1.0, frequency_penalty=-1.5, min_p=0.1)
    ),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_certain_choice_is_that_of_the_whole_answer(kind):
    sampler, rows, k = SAMPLERS[kind], 600, 15
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(rows, 300, generator=generator)
    shift = 2 * torch.randn(rows, 300, generator=generator)
    answers = [make_answer(listed_from(row, k, None), TINY, k) for row in base]
    known = torch.stack([answer.logits(300) for answer in answers]) + shift
    ceiling = torch.stack([answer.ceiling(300) for answer in answers]) + shift
    streams, positions = list(range(rows)), [row % 5 for row in range(rows)]
    written = (base + shift).topk(8).indices[:, ::2].tolist()  # penalised, if anything is
    histories = [History(torch.tensor([], dtype=torch.long), row) for row in written]
    truth = sampler.choose(base + shift, streams, positions, histories)
    chosen = sampler.choose(known, streams, positions, histories)
    certain = sampler.certain(chosen, known, ceiling, streams, positions, histories)
    assert torch.equal(chosen[certain], truth[certain])
    assert certain.sum() > (0 if kind == "choices" else rows / 20), "it must prove something"
    assert (chosen != truth).sum() > 0, "and there must be something to catch"
    everything = sampler.certain(truth, base, base, streams, positions, histories)
    assert everything.all()


def test_nothing_is_chosen_where_nothing_allowed_is_listed():
    logits = torch.full((2, 300), -torch.inf)
    logits[:, 7] = 1.0
    for kind in ("choices", "banned"):
        assert SAMPLERS[kind].choose(logits, [0, 1], [0, 0]).tolist() == [NOTHING] * 2
    for kind in ("greedy", "temperature", "top_k", "top_p"):
        assert SAMPLERS[kind].choose(logits, [0, 1], [0, 0]).tolist() == [7, 7]
    banned = Sampler(Decoding(max_new_tokens=1, temperature=1.0, top_p=0.5), banned=[7])
    assert banned.choose(logits, [0, 1], [0, 0]).tolist() == [NOTHING] * 2


def test_blocks_grow_with_acceptance():
    pace = RequestPace()
    assert pace.width(1) == pace.ahead(1) == 4  # 0.5 ** 3 is the last above a tenth
    for _ in range(60):
        pace.observe(1, 4, 1.0, [3])
    assert pace.width(1) == MAX_WIDTH
    for _ in range(200):
        pace.observe(1, 4, 1.0, [0])
    assert pace.width(1) == 2  # one drafted token costs nothing but the drafting
    assert RequestPace(6).width(1) == 7
