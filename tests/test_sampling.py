"""Choosing tokens: the filters of transformers, noise that depends on its names alone."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import tiny_model, tiny_tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import proxytune
from proxytune.engine.penalties import History
from proxytune.engine.sampling import (
    Sampler,
    gumbel_noise,
    position_stream,
    sample_stream,
    token_texts,
    tokens_of,
)
from proxytune.records import Decoding


def reference(logits, temperature, top_k, top_p):
    """The filtered distribution as transformers defines it."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)  # in float32 an unlikely token that is kept rounds to 0


def draws(sampler, logits, count, key="k"):
    """`count` samples of one row, in one batch."""
    streams = [sample_stream(0, key, sample) for sample in range(count)]
    return sampler.choose(logits.expand(count, -1), streams, [1] * count)


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(2, 1500),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 2000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_only_what_transformers_keeps_is_drawn(vocab, temperature, top_k, top_p, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(1, vocab, generator=generator)
    sampler = Sampler(Decoding(temperature=temperature, top_k=top_k, top_p=top_p))
    kept = reference(logits, temperature, top_k, top_p)[0]
    if top_k or top_p < 1:
        values, ids = sampler._candidates(logits / temperature)
        mine = torch.zeros(vocab, dtype=torch.bool)
        mine[ids[0, values[0] > -torch.inf]] = True
        # Where the mass meets top_p within rounding, one token more or less is the same set.
        assert int((mine ^ (kept > 0)).sum()) <= (1 if 0 < top_p < 1 else 0)
        assert mine.any()
    chosen = draws(sampler, logits, 20)
    assert bool((kept[chosen] > 0).all()) or top_p < 1


@pytest.mark.parametrize(
    "setting", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 4}, {"top_k": 6, "top_p": 0.9}]
)
def test_the_distribution_is_the_filtered_softmax(setting):
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0]])
    decoding = Decoding(**{"temperature": 1.0, **setting})
    want = reference(logits, decoding.temperature, decoding.top_k, decoding.top_p)[0]
    counts = torch.bincount(draws(Sampler(decoding), logits, 20_000), minlength=8)
    assert int(counts[want == 0].sum()) == 0
    kept = want > 0
    shares = want[kept].double() / want[kept].double().sum()
    assert stats.chisquare(counts[kept].numpy(), 20_000 * shares.numpy()).pvalue > 1e-3


@pytest.mark.thinned(1)
@pytest.mark.parametrize("speculative", [False, 3])
def test_a_triples_samples_follow_the_formula(speculative):
    """Chi-square of the first two tokens against the exact softmax of the formula."""
    models = [
        tiny_model("llama", seed, vocab=12, scale=6.0, eos_token_id=None) for seed in (1, 2, 3)
    ]
    generator = proxytune.load(*models, alpha=0.8)
    prompt, count = [1, 5, 3], 4000
    temperature, top_p = 0.8, 0.9
    got = generator.generate(
        [prompt],
        max_new_tokens=2,
        temperature=temperature,
        top_p=top_p,
        n=count,
        speculative=speculative,
        batch_size=500,
    )
    first = reference(generator.logits(prompt)[-1:], temperature, 0, top_p)[0]
    exact = torch.zeros(12, 12)
    for token in range(12):
        if first[token] > 0:
            logits = generator.logits([*prompt, token])[-1:]
            exact[token] = first[token] * reference(logits, temperature, 0, top_p)[0]
    counts = torch.zeros(12, 12)
    for generation in got:
        counts[tuple(generation.token_ids)] += 1
    assert float(counts[exact == 0].sum()) == 0
    # Cells with few expected draws are merged: the chi-square test requires that.
    small = (exact > 0) & (exact * count < 10)
    observed = [*counts[exact * count >= 10].tolist(), float(counts[small].sum())]
    expected = [*(exact[exact * count >= 10] * count).tolist(), float(exact[small].sum()) * count]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    scale = sum(observed) / sum(expected)
    assert scale == pytest.approx(1, abs=1e-3)
    assert stats.chisquare(observed, [scale * each for each in expected]).pvalue > 1e-3


def test_noise_is_standard_gumbel_and_the_same_everywhere():
    streams = torch.tensor([position_stream(sample_stream(0, "a", 0), p) for p in range(40)])
    noise = gumbel_noise(streams, torch.arange(500))
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # Neighbouring positions and neighbouring tokens are uncorrelated.
    for one, other in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(one.numel())
    picked = torch.tensor([[3, 77, 400]] * 40)
    assert torch.equal(gumbel_noise(streams, picked), noise[:, [3, 77, 400]])


def test_the_noise_is_pinned():
    """Stored samples stay reproducible: these numbers must never change."""
    stream = sample_stream(7, "gsm8k/12", 3)
    assert stream == 15082671478094305664
    noise = gumbel_noise(torch.tensor([position_stream(stream, 5)]), torch.tensor([0, 1, 31_999]))
    assert noise[0].tolist() == pytest.approx([1.159, -0.504849, 0.572309], abs=1e-5)


def test_the_smallest_top_p_leaves_the_likeliest_token():
    sampler = Sampler(Decoding(temperature=1.0, top_p=5e-324))  # 0 in float32
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert draws(sampler, logits, 20).tolist() == [1] * 20


def test_bans_and_choices():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    greedy = Decoding()
    streams = [0, 1]
    assert Sampler(greedy, banned=[0]).choose(logits, streams, [0, 1]).tolist() == [1, 1]
    assert Sampler(greedy, banned_first=[0]).choose(logits, streams, [0, 1]).tolist() == [1, 0]
    assert Sampler(greedy, choices=[2, 3]).choose(logits, streams, [0, 1]).tolist() == [2, 2]
    both = Sampler(greedy, banned=[2], choices=[2, 3])
    assert both.choose(logits, streams, [0, 1]).tolist() == [3, 3]
    assert logits[0].tolist() == [5.0, 4.0, 3.0, 2.0]
    sampled = Sampler(Decoding(temperature=1.0, top_p=0.99), banned=[0, 1])
    assert set(draws(sampled, logits[:1], 200).tolist()) <= {2, 3}


def test_a_string_bans_every_token_that_writes_it():
    texts = ["x", "The", " The", " The ", "the", "\n", "\n\n", " "]
    assert tokens_of(["The"], texts) == {1, 2, 3}
    assert tokens_of(["\n"], texts) == {5}
    assert tokens_of(["two words"], texts) == set()
    tokenizer = tiny_tokenizer()
    assert token_texts(tokenizer, 300)[2] == "</s>"


@pytest.mark.parametrize(
    ("setting", "lists"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {}),
        ({"temperature": 1.2, "min_p": 0.1, "repetition_penalty": 1.4}, {"banned": [3]}),
        (
            {"presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"banned_first": [1], "bias": {4: 2}},
        ),
        ({}, {"choices": [2, 7]}),
    ],
)
def test_a_sampler_in_another_process_chooses_the_same(setting, lists):
    sampler = Sampler(Decoding(**setting), **lists)
    sent = json.loads(json.dumps(sampler.to_dict()))
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, 40)
    streams, positions = list(range(64)), [i % 3 for i in range(64)]
    histories = [History(torch.tensor([5, 9]), [i % 40, 3]) for i in range(64)]
    chosen = sampler.choose(logits, streams, positions, histories)
    again = Sampler.from_dict(sent).choose(logits, streams, positions, histories)
    assert torch.equal(chosen, again) and len(set(chosen.tolist())) > 1
