"""Every formula, decoded through the engine: equal to a brute force that caches nothing."""

import math
from functools import partial

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import proxytune
from proxytune.errors import UserError
from proxytune.formula import contrastive, dexperts, gated, guidance, sum_of_pairs
from proxytune.loading.formulas import alphas_of, choose, try_out
from proxytune.proxy import combine_logits, traits_of

TOKENIZER = tiny_tokenizer()
EOS = 2
ARCHS = ("llama", "qwen3", "gpt2")
PROMPTS = [[1, 40, 41, 42, 43], [1, 60, 61, 62], [1] + [30, 31] * 8]


def models(arch: str, count: int):
    hidden = 48 if arch != "gpt2" else 64
    return [tiny_model(arch, 1, hidden=hidden, layers=3)] + [
        tiny_model(arch, seed) for seed in range(2, count + 1)
    ]


# The formulas again, for one row of float64 logits [vocab], in the papers' terms.


def slow_proxy(base, expert, antiexpert):
    return base + 0.7 * (expert - antiexpert)


def slow_pairs(base, expert, antiexpert, other, antiother):
    return base + 0.7 * (expert - antiexpert) + 0.4 * (other - antiother)


def slow_dexperts(base, expert, antiexpert, top_k=0, top_p=1.0):
    order = sorted(range(len(base)), key=lambda i: -float(base[i]))[: top_k or None]
    kept, mass = [], 0.0
    probs = dict(zip(order, base[order].softmax(-1).tolist(), strict=True))
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    out = torch.full_like(base, -torch.inf)
    out[kept] = (base + 0.7 * (expert - antiexpert))[kept]
    return out


def slow_contrastive(base, antiexpert):
    p, q = base.softmax(-1), antiexpert.softmax(-1)
    return torch.where(p >= 0.1 * p.max(), p.log() - 0.7 * q.log(), -torch.inf)


def slow_gated(base, expert, antiexpert):
    sure = base.softmax(-1).max() >= 0.06
    return base if sure else base + 0.7 * (expert - antiexpert)


def slow_guidance(base, other):
    return 1.7 * base - 0.7 * other


CASES = {
    "proxy": (combine_logits, slow_proxy, 3),
    "dexperts_top_k": (partial(dexperts, top_k=5), partial(slow_dexperts, top_k=5), 3),
    "dexperts_top_p": (partial(dexperts, top_p=0.9), partial(slow_dexperts, top_p=0.9), 3),
    "gated": (partial(gated, threshold=0.06), slow_gated, 3),
    "contrastive": (contrastive, slow_contrastive, 2),
}


def slow(formula, members, prompts, count):
    """Greedy tokens; every model reads everything again for every token."""
    read, out = [list(ids) for ids in prompts], []
    with torch.inference_mode():
        while len(out) < count:
            last = [
                m(torch.tensor([ids])).logits[0, -1].double()
                for m, ids in zip(members, read, strict=True)
            ]
            token = int(formula(*last).argmax())
            if token == EOS:
                break
            out.append(token)
            for ids in read:
                ids.append(token)
    return out


def load(name: str, members):
    formula, _, count = CASES[name]
    roles = ("base", "expert", "antiexpert") if count == 3 else ("base", "antiexpert")
    given = dict(zip(roles, members, strict=True))
    return proxytune.load(**given, alpha=0.7, formula=formula, tokenizer=TOKENIZER)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_greedy_text_equals_brute_force(name, arch):
    _, slowly, count = CASES[name]
    members = models(arch, count)
    want = [slow(slowly, members, [ids] * count, 16) for ids in PROMPTS]
    generator = load(name, members)
    for speculative, batch_size in ((False, 3), (3, 2), ("auto", 1)):
        got = generator.generate(
            PROMPTS, max_new_tokens=16, speculative=speculative, batch_size=batch_size
        )
        assert [each.token_ids for each in got] == want


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", CASES)
def test_sampled_tokens_follow_the_formula(name):
    """A chi-square test of the first token, over 3,000 samples; sure beforehand, as seeds are."""
    _, slowly, count = CASES[name]
    members = models("llama", count)
    with torch.inference_mode():
        logits = [m(torch.tensor([PROMPTS[0]])).logits[0, -1].double() for m in members]
    want = slowly(*logits).softmax(-1)
    generator = load(name, members)
    got = generator.generate(PROMPTS[:1], max_new_tokens=1, temperature=1.0, n=3000)
    counts = torch.zeros(len(want), dtype=torch.double)
    for each in got:
        counts[each.token_ids[0] if each.token_ids else EOS] += 1
    assert not bool(counts[want == 0].any())
    often = want * 3000 >= 5
    chi = (((counts - 3000 * want) ** 2) / (3000 * want))[often].sum().item()
    free = int(often.sum())
    assert chi < free + 4 * math.sqrt(2 * free)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("speculative", [False, 3, "auto"])
def test_several_pairs_add_up(speculative):
    members = models("llama", 5)
    base, expert, antiexpert, other, antiother = members
    generator = proxytune.load(
        base,
        pairs={"math": (expert, antiexpert), "chat": (other, antiother)},
        alpha={"math": 0.7, "chat": 0.4},
        tokenizer=TOKENIZER,
    )
    assert generator.roles == (
        "base",
        "math_expert",
        "math_antiexpert",
        "chat_expert",
        "chat_antiexpert",
    )
    prompts = [
        dict(zip(generator.roles, [ids, ids, [1, 7], [1, *ids], ids], strict=True))
        for ids in PROMPTS
    ]
    want = [slow(slow_pairs, members, list(p.values()), 16) for p in prompts]
    got = generator.generate(prompts, max_new_tokens=16, speculative=speculative)
    assert [each.token_ids for each in got] == want


@pytest.mark.thinned(1)
@pytest.mark.parametrize("arch", ARCHS)
def test_guidance_has_one_copy_of_the_weights_and_two_prompts(arch):
    (base,) = models(arch, 1)
    generator = proxytune.load(base, alpha=0.7, formula=guidance, tokenizer=TOKENIZER)
    prompts = [{"base": ids, "antiexpert": [1, *ids[-2:]]} for ids in PROMPTS]
    want = [slow(slow_guidance, [base, base], list(p.values()), 16) for p in prompts]
    got = generator.generate(prompts, max_new_tokens=16, batch_size=2)
    assert [each.token_ids for each in got] == want
    assert generator.members["antiexpert"].model is generator.members["base"].model


def test_guidance_reads_both_prompts_in_one_pass(monkeypatch):
    (base,) = models("llama", 1)
    generator = proxytune.load(base, alpha=0.7, formula=guidance, tokenizer=TOKENIZER)
    calls = []
    forward = type(base).forward
    monkeypatch.setattr(
        type(base), "forward", lambda self, **kw: calls.append(1) or forward(self, **kw)
    )
    generator.generate([[1, 40, 41]], max_new_tokens=6, ignore_eos=True)
    assert len(calls) == 2 + 5  # each prompt alone, then both rows together


def half_of_both(base, expert, antiexpert, alpha):
    """A user's own formula."""
    return base.float() + alpha * 0.5 * (expert.float() - antiexpert.float())


def test_a_formula_of_ones_own():
    members = models("llama", 3)
    base, expert, antiexpert = members
    generator = proxytune.load(
        base, expert, antiexpert, alpha=1.4, formula=half_of_both, tokenizer=TOKENIZER
    )
    want = [slow(slow_proxy, members, [ids] * 3, 16) for ids in PROMPTS]
    got = generator.generate(PROMPTS, max_new_tokens=16)
    assert [each.token_ids for each in got] == want


def test_proxy_tuning_is_the_default_bit_for_bit():
    base, expert, antiexpert = torch.randn(3, 4, 300).unbind()
    want = combine_logits(base, expert, antiexpert, 0.7)
    named = sum_of_pairs(base=base, a_expert=expert, a_antiexpert=antiexpert, a_alpha=0.7)
    assert torch.equal(named, want)
    assert choose(None, ["expert", "antiexpert"]) is combine_logits
    assert choose(None, ["a_expert", "a_antiexpert"]) is sum_of_pairs


def test_log_likelihoods_are_the_formulas():
    members = models("llama", 3)
    generator = load("gated", members)
    ids = [1, 40, 41, 42, 43, 44]
    with torch.inference_mode():
        each = [m(torch.tensor([ids])).logits[0].double() for m in members]
    rows = [slow_gated(*row).log_softmax(-1) for row in zip(*each, strict=True)]
    want = sum(float(rows[place - 1][ids[place]]) for place in (3, 4, 5))
    ((got, _),) = generator.loglikelihood([(ids[:3], ids[3:])])
    assert got == pytest.approx(want, abs=1e-4)


def test_gated_counts_the_tokens_that_were_touched():
    members = models("llama", 3)
    generator = load("gated", members)
    (got,) = generator.generate(PROMPTS[:1], max_new_tokens=16, ignore_eos=True)
    touched, read = 0, list(PROMPTS[0])
    for token in got.token_ids:
        with torch.inference_mode():
            base = members[0](torch.tensor([read])).logits[0, -1]
        touched += float(base.softmax(-1).max()) < 0.06
        read.append(token)
    assert got.extra["touched"] == touched
    assert 0 < touched < 16


def with_role(role, base, expert, antiexpert, alpha):
    return base


WRONG = {
    "contrastive needs fewer": (contrastive, ["expert", "antiexpert"], "with antiexpert; given"),
    "a pair is missing": (combine_logits, ["antiexpert"], "with expert, antiexpert; given"),
    "gated without a threshold": (
        gated,
        ["expert", "antiexpert"],
        "a setting, give it a value",
    ),
    "no function": ("gated", ["expert", "antiexpert"], "no function of logits"),
    "no base": (lambda expert, antiexpert: expert, ["expert", "antiexpert"], "are base"),
    "a parameter without a meaning": (with_role, ["expert", "antiexpert"], "role is no member"),
    "the base alone": (lambda base: base, [], "nothing with the base"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_formula_that_cannot_be_used_is_refused_by_name(name):
    formula, helpers, words = WRONG[name]
    with pytest.raises(UserError, match=words):
        choose(formula, helpers)


def test_a_formula_of_several_models_is_refused_for_one():
    with pytest.raises(UserError, match="combines the base with antiexpert; given: nothing"):
        proxytune.load(models("llama", 1)[0], formula=contrastive, tokenizer=TOKENIZER)


def test_alphas_are_checked_against_the_pairs():
    helpers = ["math_expert", "math_antiexpert", "chat_expert", "chat_antiexpert"]
    assert alphas_of(sum_of_pairs, 0.5, helpers) == {"math_alpha": 0.5, "chat_alpha": 0.5}
    with pytest.raises(UserError, match="pairs are math, chat"):
        alphas_of(sum_of_pairs, {"math": 1.0}, helpers)
    with pytest.raises(UserError, match="finite"):
        alphas_of(combine_logits, math.nan, ["expert", "antiexpert"])
    with pytest.raises(UserError, match="takes no alpha"):
        alphas_of(lambda base, expert, antiexpert: base, 0.5, ["expert", "antiexpert"])


@pytest.mark.parametrize("bad", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_settings_of_a_formula_are_refused(bad):
    with pytest.raises(UserError, match="dexperts"):
        try_out(partial(dexperts, **bad), ["expert", "antiexpert"], {"alpha": 1.0}, 8)


def test_a_base_that_lists_few_tokens_takes_formulas_that_rise_with_it():
    assert traits_of(combine_logits).rises
    choose(contrastive, ["antiexpert"], few=True)
    for formula in (partial(gated, threshold=0.5), partial(dexperts, top_k=3), half_of_both):
        with pytest.raises(UserError, match="needs every logit of the base"):
            choose(formula, ["expert", "antiexpert"], few=True)


def narrow(base, expert, antiexpert, alpha):
    return base[..., :-1]


def half(base, expert, antiexpert, alpha):
    return base.half()


def in_place(base, expert, antiexpert, alpha):
    return base.add_(alpha * (expert - antiexpert))


def over_rows(base, expert, antiexpert, alpha):
    return base - base.mean(0)


def logarithm(base, expert, antiexpert, alpha):
    return base.float().log()


def misspelt(base, expert, antiexpert, alpha):
    return base + exprt  # noqa: F821


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (logarithm, "gives NaN"),
        (misspelt, "NameError: name 'exprt' is not defined .*test_formula.py, line"),
        (narrow, "for logits of"),
        (half, "torch.float16"),
        (in_place, "changes the logits"),
        (over_rows, "other rows"),
    ],
)
def test_a_function_that_is_no_formula_is_refused(formula, words):
    base, expert, antiexpert = models("llama", 3)
    with pytest.raises(UserError, match=words):
        proxytune.load(base, expert, antiexpert, formula=formula, tokenizer=TOKENIZER)
