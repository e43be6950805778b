"""Builds a system from loaded models."""

from collections.abc import Mapping

from proxytune.engine.system import Member, Pair, System
from proxytune.errors import UserError
from proxytune.loading.adapters import leaves_weights
from proxytune.loading.ends import shared_end
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
    tokenizers = {role: model.tokenizer for role, model in models.items()}
    sizes = {role: model.output_size for role, model in models.items() if model.output_size}
    vocab_size = common_vocabulary(tokenizers, sizes)
    ends = {role: model.eos_ids for role, model in models.items()}
    if "expert" in models:
        end = shared_end(ends, sizes, tokenizers["base"], vocab_size)
        widths = {role: end.width(role) if end else vocab_size for role in models}
        base = _wrap(models["base"], widths["base"], cuda_graphs)
        pair = _pair(models["expert"], models["antiexpert"], widths, cuda_graphs)
        return ProxyTunedModel(base, pair, alpha, end)
    base = _wrap(models["base"], vocab_size, cuda_graphs)
    if "draft" in models:
        lost = [token for token in ends["base"] if vocab_size <= token < sizes.get("base", 0)]
        if lost:
            raise UserError(
                f"the model ends its text with token {lost[0]}, which the draft model lacks; "
                "choose another draft model"
            )
        return DraftedModel(base, _wrap(models["draft"], vocab_size, cuda_graphs))
    return Single(base)


def _pair(
    expert: LoadedModel, antiexpert: LoadedModel, widths: Mapping[str, int], cuda_graphs: bool
) -> Pair:
    """Expert and antiexpert; they share a member if the expert is an adapter on the antiexpert.

    Args:
        expert, antiexpert: the models.
        widths: role -> how many of its logits are needed.
        cuda_graphs: see `build`.
    """
    adapted, width = antiexpert.adapted, max(widths.values())
    if adapted is not None and expert.model is adapted and can_cache(adapted, width):
        return AdapterPair(AdapterModel(adapted, width))
    return Pair(
        _wrap(expert, widths["expert"], cuda_graphs),
        _wrap(antiexpert, widths["antiexpert"], cuda_graphs),
    )


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
    """Whether `spec` is an adapter on the checkpoint of `other`, loaded in the same way.

    The adapter must leave the weights as they are, for `other` uses them, too.
    """
    if other is None or spec.adapter is None or other.adapter is not None:
        return False
    names = ("id", "revision", "dtype", "device", "quantization", "attn_implementation")
    same = all(getattr(spec, name) == getattr(other, name) for name in names)
    return same and leaves_weights(spec)
