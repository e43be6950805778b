"""Passes without padding, and products of few tokens: the same logits, only faster."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from proxytune.members.cached import CachedModel
from proxytune.members.choose import make_member
from proxytune.members.narrow import NarrowProducts, narrow_products
from proxytune.members.packed import CALL, _neighbours

MODELS = {arch: tiny_model(arch, 1) for arch in ("llama", "qwen2", "qwen3", "gpt2")}
prompts = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=40), min_size=1, max_size=4)


@torch.inference_mode()
def run(member, first, second, block, counts):
    """A batch that another one joins, a block, a rollback and a step."""
    passes = [member.prefill(first)]
    tokens = torch.arange(len(first))
    if member.joins:
        passes.append(member.join(tokens, second))
    else:
        passes += [member.step(tokens), member.prefill(second)]
    rows = len(first) + len(second)
    passes.append(member.extend(block[:rows]).flat())
    member.rollback(counts[:rows])
    member.keep([rows - 1, *range(rows - 1)])
    passes.append(member.step(torch.arange(rows)))
    return torch.cat([each.logits for each in passes]), member.lengths


@settings(max_examples=15, deadline=None)
@given(
    arch=st.sampled_from(sorted(MODELS)),
    first=prompts,
    second=prompts,
    width=st.integers(1, 4),
    together=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_passes_give_the_logits_of_padded_ones(arch, first, second, width, together, seed):
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(300, (8, width), generator=generator)
    counts = torch.randint(width + 1, (8,), generator=generator).tolist()
    packed = make_member(MODELS[arch], 300)
    assert packed.joins
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.members.packed.CALL", CALL if together else -1)
        got, lengths = run(packed, first, second, block, counts)
    want, same = run(CachedModel(MODELS[arch], 300), first, second, block, counts)
    assert lengths == same
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["gemma3", "mistral_sliding"])
def test_windows_are_not_packed(arch):
    assert not make_member(tiny_model(arch, 1), 300).joins


def test_a_failed_pass_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama", 2)
    member = make_member(model, 300)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr("proxytune.members.packed.Pack.attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        member.prefill([[1, 2, 3]])
    assert model.config._attn_implementation == "sdpa"
    assert member.lengths == []
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (2, 2), (1, 1), (2, 5)])
def test_narrow_products_are_the_linear_layers(bias, shape, monkeypatch):
    layer = torch.nn.Linear(24, 40, bias=bias).requires_grad_(False)
    tokens = torch.randn(*shape, 24)
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *pair: seen.append(1) or real(*pair))
    with NarrowProducts():
        got = layer(tokens)
    assert got.is_contiguous()
    torch.testing.assert_close(got, layer(tokens))
    assert len(seen) == (1 < shape[0] * shape[1] <= 5)


def test_narrow_products_are_for_few_tokens_on_a_cpu():
    cpu = torch.device("cpu")
    active = [n for n in range(9) if isinstance(narrow_products(n, cpu), NarrowProducts)]
    assert active == [2, 3, 4, 5]
    assert not isinstance(narrow_products(4, torch.device("meta")), NarrowProducts)
    with NarrowProducts():  # other types and wide layers stay with torch
        half = torch.nn.functional.linear(torch.ones(2, 4).half(), torch.ones(3, 4).half())
    assert half.dtype == torch.float16


@given(ends=st.lists(st.integers(1, 300), min_size=1, max_size=20), most=st.integers(-1, 200))
def test_runs_hold_every_row_once_and_pad_each_row_little(ends, most):
    runs = list(_neighbours(ends, most))
    assert [row for run in runs for row in range(len(ends))[run]] == list(range(len(ends)))
    for run in runs:
        for size in range(2, run.stop - run.start + 1):
            longest = max(ends[run][: size - 1])
            new = ends[run][size - 1]
            assert max(longest - new, (new - longest) * (size - 1)) <= most


def test_members_of_one_length_share_a_plan_and_no_lengths():
    one, two = (CachedModel(MODELS[arch], 300, joins=True) for arch in ("llama", "gpt2"))
    with torch.inference_mode():
        for member in (one, two):
            member.prefill([[1, 2, 3], [4]])
            member.step(torch.tensor([5, 6]))
        assert one.cache.write is two.cache.write
        one.rollback([1, 0])
    assert (one.lengths, two.lengths) == ([3, 2], [4, 2])
