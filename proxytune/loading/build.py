"""Builds a system from loaded models."""

from collections.abc import Mapping

from proxytune.engine.system import Member, Pair, System
from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary
from proxytune.members.adapter import AdapterModel, AdapterPair
from proxytune.members.choose import can_cache, make_member
from proxytune.proxy import ProxyTunedModel
from proxytune.single import DraftedModel, Single


def build(
    models: Mapping[str, LoadedModel], alpha: float = 1.0, cuda_graphs: bool = False
) -> System:
    """A system of these models. Two systems of the same models have separate rows.

    Args:
        models: role -> model; "base" alone, with "draft", or with "expert" and "antiexpert".
        alpha: scale on (expert - antiexpert).
        cuda_graphs: see `proxytune.load`.

    Raises:
        UserError: the vocabularies differ, or a model looks ahead.
    """
    vocab_size = common_vocabulary(
        {role: model.tokenizer for role, model in models.items()},
        {role: model.output_size for role, model in models.items() if model.output_size},
    )
    base = _wrap(models["base"], vocab_size, cuda_graphs)
    if "expert" in models:
        pair = _pair(models["expert"], models["antiexpert"], vocab_size, cuda_graphs)
        return ProxyTunedModel(base, pair, alpha)
    if "draft" in models:
        return DraftedModel(base, _wrap(models["draft"], vocab_size, cuda_graphs))
    return Single(base)


def _pair(expert: LoadedModel, antiexpert: LoadedModel, vocab_size: int, cuda_graphs: bool) -> Pair:
    """Expert and antiexpert; they share a member if the expert is an adapter on the antiexpert."""
    adapted = antiexpert.adapted
    if adapted is not None and expert.model is adapted and can_cache(adapted, vocab_size):
        return AdapterPair(AdapterModel(adapted, vocab_size))
    return Pair(_wrap(expert, vocab_size, cuda_graphs), _wrap(antiexpert, vocab_size, cuda_graphs))


def _wrap(loaded: LoadedModel, vocab_size: int, cuda_graphs: bool) -> Member:
    """The member of one loaded model."""
    if loaded.member is not None:
        return loaded.member
    if loaded.model is None:
        raise UserError(f"{loaded.spec.id if loaded.spec else 'a model'} has no weights here")
    if loaded.adapted is not None:
        return AdapterModel(loaded.adapted, vocab_size, paired=False)
    return make_member(loaded.model, vocab_size, cuda_graphs)


def shares_weights(spec: ModelSpec, other: ModelSpec | None) -> bool:
    """Whether `spec` is an adapter on the checkpoint of `other`, loaded in the same way."""
    if other is None or spec.adapter is None or other.adapter is not None:
        return False
    names = ("id", "revision", "dtype", "device", "quantization", "attn_implementation")
    return all(getattr(spec, name) == getattr(other, name) for name in names)
