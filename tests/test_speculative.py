"""Speculative decoding: the same tokens, and a pace that pays or stays away."""

import random

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import proxytune
from proxytune.engine.loop import DecodeLoop
from proxytune.engine.speculation import MAX_WIDTH, Pace

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 40, 41, 42], [1, 9], [1] + [30, 31, 32] * 6, [1, 200]]


def agreeing_triple():
    """A triple whose expert often guesses right: base and antiexpert are almost the same."""
    expert, antiexpert = tiny_model("llama", 2), tiny_model("llama", 3)
    base = tiny_model("llama", 3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in base.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std() * noise)
    return base, expert, antiexpert


AGREEING = agreeing_triple()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "n": 2, "seed": 5}])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_text_does_not_depend_on_speculation(sampling, batch_size):
    generator = proxytune.load(*AGREEING, tokenizer=TOKENIZER)
    stop = "e"
    common = {"max_new_tokens": 16, "stop": stop, "banned_first": ["a"], **sampling}
    want = generator.generate(PROMPTS, speculative=False, batch_size=batch_size, **common)
    for speculative in (3, 6, "auto"):
        got = generator.generate(PROMPTS, speculative=speculative, batch_size=batch_size, **common)
        assert got == want
    # The drafts were right often, but not always: both paths were taken.
    pace = generator._pace(3)
    assert 0.1 < pace.accepted / pace.drafted < 0.98


@pytest.mark.slow
def test_a_single_model_with_a_draft_model_writes_its_own_text():
    base, expert, antiexpert = AGREEING
    want = proxytune.load(base).generate(PROMPTS, max_new_tokens=20)
    for draft in (expert, antiexpert, base):
        generator = proxytune.load(base, draft=draft)
        for speculative in (False, 2, 5):
            got = generator.generate(
                PROMPTS, max_new_tokens=20, speculative=speculative, batch_size=2
            )
            assert [each.token_ids for each in got] == [each.token_ids for each in want]
        pace = generator._pace(5)
        assert pace.accepted <= pace.drafted
        if draft is base:  # only tokens drafted beyond a completion's end can be wrong
            assert pace.accepted == pace.drafted


@pytest.mark.parametrize(("speculative", "fixed"), [("auto", None), (True, None), (1, 1), (4, 4)])
def test_one_drafted_token_is_a_number_like_any_other(speculative, fixed):
    loop = proxytune.load(AGREEING[0], draft=AGREEING[1]).loop(1, speculative)
    assert isinstance(loop, DecodeLoop)
    pace = loop.pace
    assert pace is not None and pace.fixed == fixed


def test_recording_forces_lockstep_and_keeps_the_text():
    generator = proxytune.load(*AGREEING, tokenizer=TOKENIZER)
    want = generator.generate(PROMPTS, max_new_tokens=8, speculative=3)
    got = generator.generate(PROMPTS, max_new_tokens=8, speculative=3, record=2)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
    logits = generator.logits([*PROMPTS[0], *got[0].token_ids])
    probs = logits.softmax(-1)
    for i, entry in enumerate(got[0].extra["trace"]):
        assert entry["id"] == got[0].token_ids[i]
        want_p = float(probs[len(PROMPTS[0]) - 1 + i, entry["id"]])
        assert entry["p"]["system"] == pytest.approx(want_p, abs=1e-4)
        assert set(entry["p"]) == {"system", "base", "expert", "antiexpert"}
        assert entry["top"]["system"][0][0] == entry["id"]  # greedy
        assert len(entry["top"]["base"]) == 2


def simulate(pace: Pace, acceptance: float, small: float, tokens: int, rows: int = 1) -> float:
    """Seconds per token; a pass of the base takes 1, and 0.04 for each further token of a block."""
    rng = random.Random(0)
    clock, made = 0.0, 0
    while made < tokens * rows:
        width = pace.width(rows)
        seconds = 1 + small + 0.04 * (width - 1) * (1 + small) + width * small
        clock += seconds
        accepted = []
        for _ in range(rows):
            right = 0
            while right < width - 1 and rng.random() < acceptance:
                right += 1
            accepted.append(right)
            made += right + 1
        pace.observe(rows, width, seconds * rng.uniform(0.95, 1.05), accepted)
    return clock / made * rows


@pytest.mark.parametrize("rows", [1, 8])
def test_a_good_draft_is_used(rows):
    lockstep = 1.2
    assert lockstep / simulate(Pace(), 0.8, 0.1, 400, rows) > 2.0
    assert lockstep / simulate(Pace(), 0.95, 0.1, 400, rows) > 3.0


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("small", [0.1, 0.5, 1.0])
def test_a_bad_draft_never_costs_more_than_five_percent(acceptance, small):
    lockstep = 1 + 2 * small
    assert simulate(Pace(), acceptance, small, 400) < 1.05 * lockstep


def test_the_pace_follows_a_change():
    pace = Pace()
    simulate(pace, 0.0, 0.1, 500)
    assert pace.width(1) <= 2
    simulate(pace, 0.9, 0.1, 2000)
    assert pace.acceptance > 0.8
    assert simulate(pace, 0.9, 0.1, 300) < 1.2 / 2


def test_a_fixed_pace_stays():
    pace = Pace(3)
    pace.observe(1, 4, 1.0, [0])
    assert pace.width(1) == 4
    assert (pace.drafted, pace.accepted) == (3, 0)
    assert Pace().width(1) == 1
    assert MAX_WIDTH >= 8
