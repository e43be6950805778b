"""Penalties, min-p and ignore_eos against a plain loop, with and without speculation.

On 538a493 none of these settings exists: every test here fails there ("unknown setting").
"""

import dataclasses
import json
import math
from collections import Counter
from functools import cache

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import proxytune
from proxytune.engine.penalties import History
from proxytune.engine.sampling import Sampler, gumbel_noise, position_stream, sample_stream
from proxytune.errors import UserError
from proxytune.experiment.identity import decoding_identity
from proxytune.records import Decoding, make_decoding

VOCAB = 16
PROMPTS = [[1, 5, 3], [4, 4, 9, 10], [7], [2, 11, 12, 13, 14, 3]]
NEW = 12
SETTINGS = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -1.0, "frequency_penalty": 1.2, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.15, "n": 3},
    {"temperature": 0.8, "min_p": 0.05, "top_p": 0.9, "repetition_penalty": 1.5},
    {"temperature": 1.3, "frequency_penalty": -0.7, "presence_penalty": 0.4, "n": 2},
    {"temperature": 1.0, "top_k": 5, "min_p": 0.3, "frequency_penalty": 2.0},
]


@cache
def models():
    """Three models of which base and antiexpert agree, so that drafts are often right."""
    more = {"vocab": VOCAB, "eos_token_id": None}
    expert, antiexpert, base = (tiny_model("llama", seed, **more) for seed in (2, 3, 3))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in base.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std() * noise)
    return base, expert, antiexpert


@cache
def triple() -> proxytune.Generator:
    return proxytune.load(*models(), alpha=0.9)


def logits_after(prompt, tokens):
    """The formula on the models themselves: each reads its own prompt."""
    with torch.no_grad():
        each = [
            model(torch.tensor([[*prompt[role], *tokens]])).logits[0, -1]
            for role, model in zip(("base", "expert", "antiexpert"), models(), strict=True)
        ]
    return each[0] + 0.9 * (each[1] - each[2])


def penalised(logits, prompt, tokens, decoding):
    """The definitions, one token at a time."""
    values = logits.tolist()
    for token in {*prompt, *tokens}:
        if values[token] > 0:
            values[token] /= decoding.repetition_penalty
        else:
            values[token] *= decoding.repetition_penalty
    for token, count in Counter(tokens).items():
        values[token] -= decoding.frequency_penalty * count + decoding.presence_penalty
    return torch.tensor(values)


def plain_loop(prompt, decoding, key, sample):
    """One sample by the definitions alone; transformers filters, the noise is ours."""
    stream = sample_stream(0, key, sample)
    tokens = []
    while len(tokens) < decoding.max_new_tokens:
        logits = logits_after(prompt, tokens)
        scores = penalised(logits, prompt["base"], tokens, decoding)[None]
        if decoding.temperature:
            scores = TemperatureLogitsWarper(decoding.temperature)(None, scores)
            if decoding.top_k:
                scores[scores < scores.topk(decoding.top_k).values[:, -1:]] = -torch.inf
            if decoding.top_p < 1:
                scores = TopPLogitsWarper(decoding.top_p)(None, scores)
            if decoding.min_p:
                scores = MinPLogitsWarper(decoding.min_p)(None, scores)
            noise_stream = torch.tensor([position_stream(stream, len(tokens))])
            scores = scores + gumbel_noise(noise_stream, torch.arange(VOCAB))
        tokens.append(int(scores.argmax()))
    return tokens


def same_for_all(prompt):
    return dict.fromkeys(("base", "expert", "antiexpert"), prompt)


def wanted(prompts, settings):
    decoding = make_decoding(max_new_tokens=NEW, **settings)
    return [
        plain_loop(prompt, decoding, f"k{index}", sample)
        for index, prompt in enumerate(prompts)
        for sample in range(decoding.n)
    ]


def generated(prompts, settings, **how):
    keys = [f"k{index}" for index in range(len(prompts))]
    got = triple().generate(prompts, max_new_tokens=NEW, sample_keys=keys, **settings, **how)
    return [each.token_ids for each in got]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_those_of_a_plain_loop(settings):
    """With drafted blocks, too: the penalties of each place are those of the tokens before it."""
    want = wanted([same_for_all(prompt) for prompt in PROMPTS], settings)
    neutral = {name: settings[name] for name in ("temperature", "n") if name in settings}
    assert generated(PROMPTS, neutral, speculative=False) != want, "the setting must matter"
    for speculative, batch_size in ((False, 3), (2, 1), (5, 16), ("auto", 2)):
        how = {"speculative": speculative, "batch_size": batch_size}
        assert generated(PROMPTS, settings, **how) == want, how
    assert triple()._pace(5).accepted > 0


@pytest.mark.thinned(1)
@pytest.mark.parametrize("speculative", [False, 3])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[6]], ids=str)
def test_the_base_s_prompt_counts_where_members_have_their_own(settings, speculative):
    """A repetition penalty counts the tokens of the base's prompt, not those of the expert's."""
    prompts = [
        {"base": [1, 5, 3], "expert": [9, 8, 1, 5, 3], "antiexpert": [5, 3]},
        {"base": [2, 9], "expert": [7, 7, 2], "antiexpert": [6, 2, 9, 12]},
    ]
    assert generated(prompts, settings, speculative=speculative) == wanted(prompts, settings)


def test_rows_of_different_penalties_share_a_batch():
    requests = []
    for index, settings in enumerate(SETTINGS[:5]):
        decoding = make_decoding(max_new_tokens=NEW, **settings)
        (request,) = triple().requests([PROMPTS[0]], decoding, sample_keys=["k0"])
        requests.append(dataclasses.replace(request, index=index))
    for speculative in (False, 4):
        done = list(triple().loop(8, speculative).run(requests))
        for each in done:
            (want,) = wanted([same_for_all(PROMPTS[0])], SETTINGS[each.index])
            assert each.token_ids == want
        assert len(done) == 5


def test_rows_that_are_read_again_keep_their_history(monkeypatch):
    """When memory runs out, rows leave the system and come back with what they have written."""
    settings = {"frequency_penalty": 1.1, "repetition_penalty": 1.4}
    want = wanted([same_for_all(prompt) for prompt in PROMPTS], settings)
    system, passes = triple().system, []
    extend = type(system).extend

    def failing(self, tokens):
        passes.append(tokens)
        if len(passes) == 7:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return extend(self, tokens)

    monkeypatch.setattr(type(system), "extend", failing)
    assert generated(PROMPTS, settings, speculative=False, batch_size=4) == want
    assert len(passes) > 7


def test_a_draft_model_guesses_under_the_same_penalties():
    base, expert, _ = models()
    settings = {"max_new_tokens": NEW, "repetition_penalty": 1.8, "presence_penalty": 0.7}
    want = proxytune.load(base).generate(PROMPTS, **settings)
    for draft in (expert, base):
        generator = proxytune.load(base, draft=draft)
        got = generator.generate(PROMPTS, speculative=4, batch_size=1, **settings)
        assert [each.token_ids for each in got] == [each.token_ids for each in want]
        pace = generator._pace(4)
        if draft is base:  # only tokens drafted beyond a completion's end can be wrong
            assert pace.accepted == pace.drafted


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_is_that_of_transformers(penalty):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.tensor([[1, 2, 3, 3], [4, 5, 6, 7], [9, 9, 9, 9]])
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    sampler = Sampler(Decoding(repetition_penalty=penalty))
    histories = [History(row[:2].unique(), row[2:].tolist()) for row in ids]
    before = logits.clone()
    got = sampler._allowed(logits, [2, 2, 2], histories)
    assert torch.equal(got, want)
    assert torch.equal(logits, before)


def test_a_forbidden_token_stays_forbidden():
    """A penalty below 1, or a negative one, must not bring a banned token back, nor make nan."""
    logits = torch.tensor([[-torch.inf, 3.0, 2.0, -1.0]])
    settings = {"repetition_penalty": 0.5, "presence_penalty": -2.0, "frequency_penalty": -2.0}
    sampler = Sampler(Decoding(**settings), banned=[1])
    histories = [History(torch.tensor([0, 1]), [0, 1, 1, 0])]
    assert sampler.choose(logits, [0], [4], histories).tolist() == [2]


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("more", [{}, {"top_k": 6}, {"top_p": 0.7}], ids=str)
def test_min_p_keeps_what_transformers_keeps(min_p, more):
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    logits[0, 7] = logits[0, 8] = logits.max() + 0.5  # two likeliest
    decoding = Decoding(temperature=1.2, min_p=min_p, **more)
    scores = logits / 1.2
    if "top_k" in more:
        scores[scores < scores.topk(6).values[:, -1:]] = -torch.inf
    if "top_p" in more:
        scores = TopPLogitsWarper(0.7)(None, scores)
    kept = MinPLogitsWarper(min_p)(None, scores)[0] > -torch.inf
    streams = [sample_stream(0, "k", sample) for sample in range(3000)]
    chosen = Sampler(decoding).choose(logits.expand(3000, -1), streams, [1] * 3000)
    probs = (scores[0].masked_fill(~kept, -torch.inf)).softmax(-1)
    shares = torch.bincount(chosen, minlength=60) / 3000
    assert float(shares[~kept].sum()) == 0
    assert float((shares - probs).abs().max()) < 4 * math.sqrt(0.25 / 3000)
    if min_p == 1.0:
        assert set(chosen.tolist()) == {7, 8}


def test_a_checkpoints_own_penalty_is_not_applied_unasked():
    """transformers' `generate` would apply it (Qwen2.5-Instruct has 1.05), to one member alone."""
    plain = [tiny_model("llama", seed) for seed in range(3)]
    own = [tiny_model("llama", seed) for seed in range(3)]
    for model in own:
        model.generation_config.repetition_penalty = 1.8
    texts = [
        [each.token_ids for each in proxytune.load(*models).generate([[1, 40]], max_new_tokens=24)]
        for models in (plain, own)
    ]
    assert texts[0] == texts[1]
    (asked,) = proxytune.load(*own).generate([[1, 40]], max_new_tokens=24, repetition_penalty=1.8)
    assert [asked.token_ids] != texts[0]


def test_ignore_eos_goes_on():
    """The end token is then written like any other, and only the length ends the completion."""
    base = tiny_model("llama", 0)
    base.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    generator = proxytune.load(base, tokenizer=tokenizer)
    forced = {"choices": ["</s>"], "max_new_tokens": 5}
    (ended,) = generator.generate([[1, 40]], **forced)
    assert ended.finish_reason == "eos" and ended.token_ids == []
    for speculative in (False, "auto"):
        (going,) = generator.generate([[1, 40]], ignore_eos=True, speculative=speculative, **forced)
        assert going.finish_reason == "length" and going.text == ""
        assert going.token_ids == [tokenizer.eos_token_id] * 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.2),
        ("repetition_penalty", 1e9),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", True),
        ("presence_penalty", 2.1),
        ("presence_penalty", -3),
        ("frequency_penalty", 5),
        ("frequency_penalty", float("-inf")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", "0.1"),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(UserError) as caught:
        triple().generate([[1]], **{name: value})
    message = str(caught.value)
    assert name in message and str(value).strip("'") in message and "\n" not in message


def test_neutral_values_are_the_default_path_and_the_old_identity():
    """Folders made before these settings are resumed: their identity is the same to the byte."""
    neutral = {
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": -0.0,
        "ignore_eos": False,
    }
    assert not Sampler(Decoding(**neutral)).looks_back
    assert make_decoding(**neutral) == make_decoding()
    old = {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
        "n": 1,
        "stop": ["x"],
        "banned": [],
        "banned_first": [],
        "choices": [],
        "seed": 4,
    }
    decoding = Decoding(max_new_tokens=9, temperature=0.5, stop=("x",), **neutral)
    assert json.dumps(decoding_identity(decoding, 4)) == json.dumps(old)
    for name, value in {"min_p": 0.1, "ignore_eos": True, "frequency_penalty": 0.5}.items():
        changed = decoding_identity(dataclasses.replace(decoding, **{name: value}), 4)
        assert changed == old | {name: value}
