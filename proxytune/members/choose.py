"""Chooses the member for a loaded model: with a cache if that gives the same logits."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from proxytune.errors import UserError
from proxytune.members.cached import CachedModel
from proxytune.members.facts import distance, input_device, magnitude, tolerance, version_hint
from proxytune.members.graphs import may_record
from proxytune.members.recomputed import RecomputedModel

log = logging.getLogger(__name__)

_Verdict = tuple[str | None, bool]
_verdicts: WeakKeyDictionary[PreTrainedModel, dict[Any, _Verdict]] = WeakKeyDictionary()


def make_member(
    model: PreTrainedModel, vocab_size: int, cuda_graphs: bool = False
) -> CachedModel | RecomputedModel:
    """Wraps a loaded model: with a cache if that gives the same logits, else without.

    A short check compares cached passes with plain ones over the same tokens. A model whose state
    does not fit into a `RowCache` (a recurrent state, ALiBi, chunked attention) fails it by other
    logits or an error. Such a model reads every row again for each token, with a warning.

    Args:
        model: any causal LM.
        vocab_size: the logits are cut to this many entries.
        cuda_graphs: records the steps of a cached model that is on one GPU.

    Raises:
        UserError: the model looks ahead: its logits depend on later tokens; or they are NaN.
    """
    reason, joins = _verdict(model, vocab_size)
    if reason is None:
        member = CachedModel(model, vocab_size, joins)
        if cuda_graphs and may_record(model):
            member.record()
        elif cuda_graphs:
            log.warning("%s decodes without CUDA graphs: not on one GPU", type(model).__name__)
        return member
    plain = RecomputedModel(model, vocab_size)
    plain.check_causal()
    name, hint = type(model).__name__, version_hint()
    log.warning("%s decodes without a cache, exact but slow: %s%s", name, reason, hint)
    return plain


def can_cache(model: PreTrainedModel, vocab_size: int) -> bool:
    """Whether a model's logits are the same through a `RowCache`."""
    return _verdict(model, vocab_size)[0] is None


def _verdict(model: PreTrainedModel, vocab_size: int) -> _Verdict:
    """Why a model cannot decode with a cache, None if it can; and whether its rows join.

    Checked once: a server has two systems of the same models, a triple's base may stand alone, too.
    """
    known = _verdicts.setdefault(model, {})
    asked = (vocab_size, model.dtype, model.config.get_text_config()._attn_implementation)
    if asked not in known:
        reason = _refusal(CachedModel(model, vocab_size))
        joins = reason is None and _may_join(model)
        known[asked] = reason, joins and not _refusal(CachedModel(model, vocab_size, joins=True))
    return known[asked]


def _may_join(model: PreTrainedModel) -> bool:
    """Whether packed passes pay and are possible: on a CPU, with plain attention over a row."""
    config = model.config.get_text_config()
    plain = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    return plain and input_device(model).type == "cpu"


@torch.inference_mode()
def _refusal(cached: CachedModel) -> str | None:
    """The reason why a `CachedModel` does not give its model's logits; None if it does."""
    model, vocab_size = cached.model, cached.vocab_size
    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"layers of type {', '.join(sorted(odd))}"
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (9, 14))
    try:
        got = _cached_logits(cached, short, long)
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a foreign forward pass may raise anything
        return f"its forward pass does not take the cache ({type(error).__name__}: {error})"
    want = _plain_logits(RecomputedModel(model, vocab_size), short, long)
    if [g.shape for g in got] != [w.shape for w in want]:
        return "its cached logits have another shape than the plain ones"
    if any(bool(w.isnan().any()) for w in want):
        raise UserError(
            f"{model.config._name_or_path or type(model).__name__} gives logits of NaN; load it in "
            "another dtype (bfloat16 or float32), and check its weights"
        )
    worst = max(distance(g, w) for g, w in zip(got, want, strict=True))
    scale = max(magnitude(w) for w in want)
    if worst <= tolerance(model.dtype) * scale:
        return None
    return f"its cached logits differ from the plain ones by {worst:.2g} of {scale:.2g}"


def _cached_logits(cached: CachedModel, short: list[int], long: list[int]) -> list[torch.Tensor]:
    """Logits of every kind of pass over two rows: prefill, step, block after a rollback, join.

    Args:
        cached: an idle member.
        short: 9 tokens for the first row, which reads 4 of them as its prompt.
        long: 14 tokens for the second row, which reads 9 of them as its prompt.
    """
    logits = [cached.prefill([short[:4], long[:9]]).logits]
    logits.append(cached.step(torch.tensor([short[4], long[9]])).logits)
    cached.extend(torch.tensor([[short[5], 0, 0], [long[10], long[11], 0]]))
    cached.rollback([2, 1])
    block = cached.extend(torch.tensor([short[6:8], long[12:14]])).logits
    logits += [block[:, 0], block[:, 1]]
    logits.append(cached.join(torch.tensor([short[8], long[0]]), [long[:7], short[:1]]).logits)
    cached.clear()
    return logits


def _plain_logits(plain: RecomputedModel, short: list[int], long: list[int]) -> list[torch.Tensor]:
    """The logits that `_cached_logits` should give, from two passes over the rows as they end."""
    starts = plain.prefill([short[:1], long[:7]]).logits  # after 1 and 7 tokens
    after = plain.extend(torch.tensor([short[1:], [*long[7:], long[0]]])).logits
    before_join = [(4, 9), (5, 10), (7, 13), (8, 14)]  # the rows' lengths after each pass
    logits = [torch.stack([after[0, one - 2], after[1, other - 8]]) for one, other in before_join]
    return [*logits, torch.cat([after[:, -1], starts.flip(0)])]
