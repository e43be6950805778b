"""How a loaded model is wrapped: with a cache where that is provably the same, else without."""

import logging

import torch
from transformers import PreTrainedModel

from proxytune.members.cached import CachedModel
from proxytune.members.facts import input_device, tolerance
from proxytune.members.graphs import may_record
from proxytune.members.recomputed import RecomputedModel

log = logging.getLogger(__name__)


def make_member(
    model: PreTrainedModel, vocab_size: int, cuda_graphs: bool = False
) -> CachedModel | RecomputedModel:
    """Wraps a loaded model: with a cache where that is provably the same, else without.

    A short check compares the cache with one plain pass over the same tokens. What a cache of
    rows cannot carry (a recurrent state, ALiBi, chunked attention) shows as a difference or an
    error there; the model is then recomputed from the start for every token, with a warning.

    Raises:
        ValueError: a model that looks ahead: its logits change with the tokens behind them.
    """
    reason = _why_not(CachedModel(model, vocab_size))
    if reason is None:
        joining = CachedModel(model, vocab_size, joins=_may_join(model))
        member = joining if not _why_not(joining) else CachedModel(model, vocab_size)
        if cuda_graphs and may_record(model):
            member.record()
        elif cuda_graphs:
            log.warning("%s decodes without CUDA graphs: not on one GPU", type(model).__name__)
        return member
    plain = RecomputedModel(model, vocab_size)
    plain.check_causal()
    log.warning("%s decodes without a cache, exact but slow: %s", type(model).__name__, reason)
    return plain


def can_cache(model: PreTrainedModel, vocab_size: int) -> bool:
    """Whether a model's logits are the same through a `RowCache`."""
    return _why_not(CachedModel(model, vocab_size)) is None


def _may_join(model: PreTrainedModel) -> bool:
    """Whether packed passes make sense: on a CPU, for plain attention over the whole row."""
    config = model.config.get_text_config()
    plain = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    return plain and input_device(model).type == "cpu"


@torch.inference_mode()
def _why_not(cached: CachedModel) -> str | None:
    """Why a `CachedModel` would not give its model's logits; None where it does."""
    model, vocab_size = cached.model, cached.vocab_size
    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"layers of type {', '.join(sorted(odd))}"
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (9, 14))
    try:
        got = [cached.prefill([short[:4], long[:9]]).logits]
        got.append(cached.step(torch.tensor([short[4], long[9]])).logits)
        cached.extend(torch.tensor([[short[5], 0, 0], [long[10], long[11], 0]]))
        cached.rollback([2, 1])
        block = cached.extend(torch.tensor([short[6:8], long[12:14]])).logits
        got += [block[:, 0], block[:, 1]]
        got.append(cached.join(torch.tensor([short[8], long[0]]), [long[:5], short[:1]]).logits)
        cached.clear()
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a foreign forward pass raises means: not this way
        return f"its forward pass does not take the cache ({type(error).__name__}: {error})"
    plain = RecomputedModel(model, vocab_size)
    want = [plain.prefill([short[:4], long[:9]]).logits]
    want.append(plain.step(torch.tensor([short[4], long[9]])).logits)
    plain.clear()
    plain.prefill([short[:6], long[:12]])
    block = plain.extend(torch.tensor([short[6:8], long[12:14]])).logits
    want += [block[:, 0], block[:, 1]]
    stepped = plain.step(torch.tensor([short[8], long[0]])).logits
    want.append(torch.cat([stepped, plain.prefill([long[:5], short[:1]]).logits]))
    if [g.shape for g in got] != [w.shape for w in want]:
        return "its cached logits have another shape than the plain ones"
    worst = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    scale = max(float(w.abs().max()) for w in want)
    if worst <= tolerance(model.dtype) * scale:
        return None
    return f"its cached logits differ from the plain ones by {worst:.2g} of {scale:.2g}"
