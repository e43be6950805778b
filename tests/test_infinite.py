"""Logits that are not finite: no shift where both helpers give minus infinity, else a refusal.

The tests of the formula and of the triple fail on 538a493, which gave NaN or a token of it.
"""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import proxytune
from proxytune.errors import UserError
from proxytune.proxy import combine_logits

INF = torch.inf
TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 40, 41, 42], [1, 9], [1, 60, 61, 62, 63, 64]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0, torch.tensor([[1.0]])])
def test_no_shift_where_both_are_minus_infinity(alpha, dtype):
    base = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    expert = torch.tensor([[-INF, 5.0, -INF]], dtype=dtype)
    antiexpert = torch.tensor([[-INF, 4.0, -INF]], dtype=dtype)
    got = combine_logits(base, expert, antiexpert, alpha)
    assert got.tolist() == [[1.0, 2.0 + float(alpha), 3.0]]
    assert expert[0, 0] == -INF  # left as it was


@pytest.mark.parametrize(
    ("base", "expert", "antiexpert", "alpha", "want"),
    [
        (1.0, -INF, 2.0, 1.0, -INF),  # the expert forbids the token
        (1.0, -INF, 2.0, 0.0, 1.0),  # alpha 0 is the base, whatever the helpers say
        (1.0, 2.0, -INF, 0.0, 1.0),
        (1.0, 2.0, -INF, 1.0, INF),  # refused when a token is chosen
        (-INF, 3.0, 2.0, 1.0, -INF),  # the base forbids the token
        (-INF, 3.0, -INF, 1.0, -INF),
        (-INF, -INF, 3.0, -1.0, -INF),
        (-INF, -INF, -INF, 1.0, -INF),
    ],
)
def test_infinite_logits(base, expert, antiexpert, alpha, want):
    logits = [torch.tensor([value, 0.0]) for value in (base, expert, antiexpert)]
    assert combine_logits(*logits, alpha).tolist() == [want, 0.0]
    rows = [each.unsqueeze(0) for each in logits]
    assert combine_logits(*rows, torch.tensor([[alpha]])).tolist() == [[want, 0.0]]


def test_nan_is_not_taken_for_no_shift():
    nan = torch.tensor([torch.nan, 1.0])
    for place in range(3):
        logits = [torch.zeros(2) for _ in range(3)]
        logits[place] = nan
        assert combine_logits(*logits, 1.0).isnan().tolist() == [True, False]


def with_bias(seed: int, bias: dict[int, float]):
    """A tiny model whose logits of some tokens are replaced."""
    model = tiny_model("llama", seed)

    def put(_module, _inputs, logits):
        logits = logits.clone()
        for token, value in bias.items():
            logits[..., token] = value
        return logits

    model.lm_head.register_forward_hook(put)
    return model


@pytest.mark.thinned(1)
@pytest.mark.parametrize("speculative", [False, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_triple_that_masks_tokens_in_both_helpers(speculative, batch_size):
    # The helpers mask 250 .. 259: there the base alone decides, so a finite equal value in both
    # helpers gives the same text.
    masked = dict.fromkeys(range(250, 260), -INF)
    equal = dict.fromkeys(range(250, 260), -30.0)
    settings = {"max_new_tokens": 12, "speculative": speculative, "batch_size": batch_size}
    want = proxytune.load(tiny_model("llama", 1), with_bias(2, equal), with_bias(3, equal))
    got = proxytune.load(tiny_model("llama", 1), with_bias(2, masked), with_bias(3, masked))
    for extra in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert got.generate(PROMPTS, **settings, **extra) == want.generate(
            PROMPTS, **settings, **extra
        )
    pairs = [([1, 40], [251, 60]), ([1, 9], [7, 259, 8])]
    for one, other in zip(got.loglikelihood(pairs), want.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


def test_a_model_that_masks_tokens_keeps_its_cache(caplog):
    """538a493 compared minus infinity with itself, found NaN and decoded without a cache."""
    proxytune.load(with_bias(2, {7: -INF, 250: -INF}))
    assert "without a cache" not in caplog.text


def test_a_model_of_nan_is_refused_when_it_is_loaded():
    with pytest.raises(UserError, match=r"LlamaForCausalLM gives logits of NaN.*dtype"):
        proxytune.load(with_bias(2, {7: torch.nan}))


def test_the_expert_alone_forbids_a_token():
    base, antiexpert = tiny_model("llama", 1), tiny_model("llama", 3)
    plain = proxytune.load(base, tiny_model("llama", 2), antiexpert)
    first = plain.generate(PROMPTS[:1], max_new_tokens=1)[0].token_ids[0]
    forbids = proxytune.load(base, with_bias(2, {first: -INF}), antiexpert)
    assert forbids.generate(PROMPTS[:1], max_new_tokens=1)[0].token_ids[0] != first
    assert forbids.loglikelihood([(PROMPTS[0], [first])]) == [(-INF, False)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("setting", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}])
@pytest.mark.parametrize("speculative", [False, 2])
@pytest.mark.parametrize(
    ("role", "value", "named"),
    [
        ("expert", torch.nan, r"the expert gives no probabilities.*1 of its 300.*NaN.*token 77"),
        ("antiexpert", torch.nan, r"the antiexpert gives no probabilities.*dtype"),
        ("base", torch.nan, r"the base gives no probabilities"),
        ("base", INF, r"the base gives no probabilities.*infinity"),
        ("antiexpert", -INF, r"the antiexpert makes the logit of token 77 infinite.*banned"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(role, value, named, speculative, setting):
    seeds = {"base": 1, "expert": 2, "antiexpert": 3}
    models = {name: tiny_model("llama", seed) for name, seed in seeds.items()}
    generator = proxytune.load(**models, tokenizer=TOKENIZER)
    models[role].lm_head.register_forward_hook(lambda _m, _i, out: _replaced(out, 77, value))
    with pytest.raises(UserError, match=named):
        generator.generate(PROMPTS, max_new_tokens=4, speculative=speculative, **setting)
    with pytest.raises(UserError, match=named):
        generator.loglikelihood([(PROMPTS[0], [5, 6, 7])])
    if value == -INF:  # the way out that the message names
        text = TOKENIZER.decode([77])
        assert generator.generate(PROMPTS, max_new_tokens=4, banned=[text], speculative=speculative)


def test_a_single_broken_model_is_refused():
    model = tiny_model("llama", 1)
    generator = proxytune.load(model)
    model.lm_head.register_forward_hook(lambda _m, _i, out: out * torch.nan)
    with pytest.raises(UserError, match=r"the model gives no probabilities: 300 of its 300"):
        generator.generate(PROMPTS, max_new_tokens=2)
    with pytest.raises(UserError, match="the model gives no probabilities"):
        generator.loglikelihood([([1, 2], [3])])


def _replaced(logits: torch.Tensor, token: int, value: float) -> torch.Tensor:
    logits = logits.clone()
    logits[..., token] = value
    return logits
