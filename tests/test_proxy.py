"""The formula, and a triple that decodes by it: equal to a recomputation without any cache."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ARCHS, tiny_model, tiny_tokenizer

import proxytune
from proxytune.proxy import combine_logits

TOKENIZER = tiny_tokenizer()
EOS = 2
ROLES = ("base", "expert", "antiexpert")


def triple(arch: str, **base_more):
    base = tiny_model(arch, 1, hidden=48 if arch != "gpt2" else 64, layers=3, **base_more)
    return base, tiny_model(arch, 2), tiny_model(arch, 3)


def brute_force(models, prompts, count, alpha=1.0, banned=()):
    """Greedy tokens by the formula; every model reads everything again for every token."""
    read = {role: list(prompts[role]) for role in ROLES}
    out = []
    with torch.inference_mode():
        while len(out) < count:
            base, expert, antiexpert = (
                model(torch.tensor([read[role]])).logits[0, -1, :300]
                for role, model in zip(ROLES, models, strict=True)
            )
            logits = base + alpha * (expert - antiexpert)
            logits[list(banned)] = -torch.inf
            token = int(logits.argmax())
            if token == EOS:
                break
            out.append(token)
            for ids in read.values():
                ids.append(token)
    return out


def same(ids):
    return dict.fromkeys(ROLES, ids)


def test_the_formula():
    base, expert, antiexpert = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 1.0]), torch.ones(2)
    got = combine_logits(base, expert, antiexpert, 0.5)
    assert got.tolist() == [3.0, 2.0]
    assert base.tolist() == [1.0, 2.0]
    assert expert.tolist() == [5.0, 1.0]


def test_the_formula_computes_in_float32():
    base = torch.tensor([256.0], dtype=torch.bfloat16)
    expert = torch.tensor([1.0], dtype=torch.bfloat16)
    antiexpert = torch.tensor([0.5], dtype=torch.bfloat16)
    got = combine_logits(base, expert, antiexpert, 1.0)
    assert got.dtype == torch.float32
    assert got.item() == 256.5  # bfloat16 has no 256.5
    assert expert.item() == 1.0


@pytest.mark.parametrize("arch", ARCHS)
def test_batched_cached_decoding_equals_brute_force(arch):
    models = triple(arch)
    generator = proxytune.load(*models, tokenizer=TOKENIZER)
    prompts = [
        same([1, 40, 41, 42, 43]),
        {"base": [1, 5, 6], "expert": [1] + [77] * 19, "antiexpert": [1, 5, 6]},  # a chat expert
        {"base": [1] + [60, 61] * 9, "expert": [1, 8], "antiexpert": [1] + [60, 61] * 9},
        same([1]),
        same([1] + [30, 31, 32] * 10),
    ]
    want = [brute_force(models, prompt, 12) for prompt in prompts]
    assert len({tuple(ids) for ids in want}) == len(want)  # the models do read their prompts
    for batch_size in (1, 2, 5):
        got = generator.generate(prompts, max_new_tokens=12, batch_size=batch_size)
        assert [generation.token_ids for generation in got] == want


LLAMA = triple("llama")
GENERATORS = {}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompts=st.lists(
        st.tuples(*[st.lists(st.integers(3, 299), min_size=1, max_size=12)] * 3),
        min_size=1,
        max_size=5,
    ),
    alpha=st.sampled_from([-0.5, 0.0, 0.7, 1.0, 2.0]),
    batch_size=st.integers(1, 6),
    count=st.integers(1, 12),
    speculative=st.sampled_from([False, 1, 2, 5, "auto"]),
    banned=st.sets(st.integers(3, 258), max_size=3),
)
def test_any_workload_equals_brute_force(prompts, alpha, batch_size, count, speculative, banned):
    if alpha not in GENERATORS:
        GENERATORS[alpha] = proxytune.load(*LLAMA, alpha=alpha, tokenizer=TOKENIZER)
    generator = GENERATORS[alpha]
    strings = [TOKENIZER.decode([token]) for token in banned]
    strings = [string for string in strings if string.isalnum()]
    texts = [TOKENIZER.decode([token]) for token in range(300)]
    dead = [i for i, text in enumerate(texts) if text in strings or text.strip() in strings]
    by_role = [dict(zip(ROLES, prompt, strict=True)) for prompt in prompts]
    got = generator.generate(
        by_role,
        max_new_tokens=count,
        batch_size=batch_size,
        speculative=speculative,
        banned=strings,
    )
    for prompt, generation in zip(by_role, got, strict=True):
        assert generation.token_ids == brute_force(LLAMA, prompt, count, alpha, dead)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_alpha_zero_is_generate_of_the_base(arch):
    models = triple(arch)
    prompt = [1, 40, 41, 42, 43, 44]
    want = models[0].generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=16, pad_token_id=0
    )
    want = [token for token in want[0, len(prompt) :].tolist() if token != EOS]
    got = proxytune.load(*models, alpha=0.0).generate([prompt], max_new_tokens=16)
    assert got[0].token_ids == want


def test_equal_helpers_leave_the_base():
    base, expert, _ = LLAMA
    prompts = [[1, 40, 41], [1, 9, 8, 7, 6, 5]]
    want = proxytune.load(base).generate(prompts, max_new_tokens=16)
    got = proxytune.load(base, expert, expert, alpha=1.7).generate(prompts, max_new_tokens=16)
    assert got == want


def test_equal_base_and_antiexpert_leave_the_expert():
    base, expert, _ = LLAMA
    prompts = [[1, 40, 41], [1, 9, 8, 7, 6, 5]]
    want = proxytune.load(expert).generate(prompts, max_new_tokens=16)
    got = proxytune.load(base, expert, base).generate(prompts, max_new_tokens=16)
    assert got == want


def test_padded_logits_are_cut_to_what_all_members_share():
    base = tiny_model("llama", 1, vocab=320)
    expert, antiexpert = tiny_model("llama", 2, vocab=304), tiny_model("llama", 3, vocab=300)
    with torch.no_grad():  # tokens that the tokenizer does not have must not win
        base.lm_head.weight[300:] = 50 * base.lm_head.weight[5]
        expert.lm_head.weight[300:] = -50 * expert.lm_head.weight[5]
    generator = proxytune.load(base, expert, antiexpert, tokenizer=TOKENIZER)
    assert generator.vocab_size == 300
    prompts = [same([1, 40, 41, 42]), same([1, 9])]
    got = generator.generate(prompts, max_new_tokens=12)
    want = [brute_force((base, expert, antiexpert), prompt, 12) for prompt in prompts]
    assert [generation.token_ids for generation in got] == want


def test_logits_are_the_formula_at_every_position():
    generator = proxytune.load(*LLAMA, alpha=0.5, tokenizer=TOKENIZER)
    ids = [1, 40, 41, 42, 43]
    with torch.inference_mode():
        base, expert, antiexpert = (model(torch.tensor([ids])).logits[0] for model in LLAMA)
    got = generator.logits(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, base + 0.5 * (expert - antiexpert), atol=2e-5, rtol=1e-5)


def test_loglikelihood_is_the_sum_of_log_probabilities():
    generator = proxytune.load(*LLAMA, tokenizer=TOKENIZER)
    greedy = generator.generate([[1, 40, 41]], max_new_tokens=4)[0].token_ids
    pairs = [([1, 40, 41], greedy), ([1, 50], [60, 61, 62, 63, 64]), ([1, 50, 51, 52], [7])]
    for batch_size in (1, 3):
        got = generator.loglikelihood(pairs, batch_size=batch_size)
        for (context, continuation), (value, is_greedy) in zip(pairs, got, strict=True):
            logits = generator.logits([*context, *continuation])[len(context) - 1 : -1]
            log_probs = logits.log_softmax(-1)
            want = sum(float(log_probs[i, t]) for i, t in enumerate(continuation))
            assert value == pytest.approx(want, abs=1e-3)
            assert is_greedy == (logits.argmax(-1).tolist() == list(continuation))
    assert got[0][1] is True


def test_loglikelihood_reads_a_shared_context_once_and_survives_little_memory(monkeypatch):
    generator = proxytune.load(*LLAMA, tokenizer=TOKENIZER)
    context = [1, 40, 41, 42]
    pairs = [(context, [60 + i] * (i + 1)) for i in range(4)] + [([1, 2, 3], [9])]
    want = generator.loglikelihood(pairs, batch_size=1)
    monkeypatch.setattr("proxytune.engine.score.BLOCK_ENTRIES", 1)
    lengths, prefill = [], generator.system.prefill

    def watched(prompts):
        if len(prompts) + len(generator.system.lengths) > 1:
            raise torch.OutOfMemoryError("injected")
        lengths.append(len(prompts))
        return prefill(prompts)

    generator.system.prefill = watched
    got = generator.loglikelihood(pairs, batch_size=5)
    assert [flag for _, flag in got] == [flag for _, flag in want]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-3)
    assert len(lengths) < len(pairs)
