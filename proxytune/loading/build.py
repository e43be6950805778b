"""Builds a system from loaded models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.engine.system import Group, Member, System
from proxytune.engine.unshifted import Unshifted
from proxytune.errors import UserError
from proxytune.loading.adapters import leaves_weights
from proxytune.loading.formulas import Alphas, experts_of, settle
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import (
    STRICT,
    Vocabulary,
    common_vocabulary,
    settle_vocabulary,
)
from proxytune.members.adapter import AdapterModel
from proxytune.members.choose import can_cache, make_member
from proxytune.members.halves import HalvedModel, Halves
from proxytune.members.translated import TranslatedMember
from proxytune.proxy import Formula, ProxyTunedModel
from proxytune.single import DraftedModel, Single


def build(
    models: Mapping[str, LoadedModel],
    alpha: Alphas = 1.0,
    cuda_graphs: bool = False,
    formula: Formula | None = None,
    vocabulary: Vocabulary | None = None,
) -> System:
    """A system of these models. Two systems of the same models have separate rows.

    Args:
        models: role -> model; "base" alone, with "draft", or with the helpers that the formula
            needs ("expert" and "antiexpert"; "NAME_expert" and "NAME_antiexpert" for each pair).
        alpha: scale on (expert - antiexpert); NAME -> its scale, where there are several pairs.
        cuda_graphs: see `proxytune.load`.
        formula: combines the members' logits; None is proxy-tuning.
        vocabulary: of a base and its helpers, from `vocabulary_of`; None for a strict one.

    Raises:
        UserError: the vocabularies differ, a model looks ahead, or the formula needs other models.
    """
    helpers = [role for role in models if role not in ("base", "draft")]
    if helpers or formula is not None:
        member = models["base"].member
        shared = vocabulary or vocabulary_of(models)
        end = shared.end
        combine, scales = settle(
            formula,
            alpha,
            helpers,
            few=member is not None and not member.complete,
            vocab_size=shared.size,
        )
        groups = _groups(models, shared, cuda_graphs)
        unshifted = None
        if shared.unshifted:
            lossy = [role for role, each in shared.translations.items() if each.lossy]
            unshifted = Unshifted(shared.unshifted, lossy)
        return ProxyTunedModel(groups, scales, end, combine, _drafter(models), unshifted)
    tokenizers, sizes, ends = _facts(models)
    vocab_size = common_vocabulary(tokenizers, sizes)
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


def vocabulary_of(models: Mapping[str, LoadedModel], kind: str = STRICT) -> Vocabulary:
    """The vocabulary of a base and its helpers.

    Args:
        models: role -> model.
        kind: one of `vocabulary.KINDS`.

    Raises:
        UserError: see `settle_vocabulary`.
    """
    formats = {role: model.format for role, model in models.items()}
    return settle_vocabulary(kind, *_facts(models), formats)


def _facts(
    models: Mapping[str, LoadedModel],
) -> tuple[dict[str, Any], dict[str, int], dict[str, frozenset[int]]]:
    """Role -> tokenizer, entries of the logits where they are known, and end tokens."""
    tokenizers = {role: model.tokenizer for role, model in models.items()}
    sizes = {role: model.output_size for role, model in models.items() if model.output_size}
    return tokenizers, sizes, {role: model.eos_ids for role, model in models.items()}


def _groups(
    models: Mapping[str, LoadedModel], shared: Vocabulary, cuda_graphs: bool
) -> list[Group]:
    """The members; two that share a model share its passes, too.

    Args:
        models: role -> model.
        shared: their vocabulary.
        cuda_graphs: see `build`.
    """
    widths = {role: shared.end.width(role) if shared.end else shared.size for role in models}
    widths |= {role: each.own_size for role, each in shared.translations.items()}
    halves = _halves(models, widths)
    members: dict[str, Member] = {r: each for g in halves for r, each in g.members.items()}
    for role, model in models.items():
        if role not in members:
            members[role] = _wrap(model, widths[role], cuda_graphs)
    # A pair that is translated reads rows of unequal lengths, so that it cannot share a pass.
    whole = [group for group in halves if group.members.keys().isdisjoint(shared.translations)]
    passes = {role for group in whole for role in group.members}
    alone = {role: each for role, each in members.items() if role not in passes}
    for role, translation in shared.translations.items():
        alone[role] = TranslatedMember(alone[role], translation)
    return [*whole, Group({role: alone[role] for role in models if role in alone})]


def _halves(models: Mapping[str, LoadedModel], widths: Mapping[str, int]) -> list[Halves]:
    """The roles that share one model two by two; arguments as for `_groups`.

    They are an expert that is an adapter on its antiexpert's model, and a base that is its own
    antiexpert, under another prompt.
    """
    found = []
    for expert in experts_of(list(models)):
        antiexpert = expert.removesuffix("expert") + "antiexpert"
        adapted = models[antiexpert].adapted if antiexpert in models else None
        if adapted is None or models[expert].model is not adapted:
            continue
        width = max(widths[expert], widths[antiexpert])
        if can_cache(adapted, width):
            found.append(Halves(AdapterModel(adapted, width), (expert, antiexpert)))
    base, other = models["base"].model, models.get("antiexpert")
    if other is not None and base is not None and base is other.model:
        width = max(widths["base"], widths["antiexpert"])
        if can_cache(base, width):
            found.append(Halves(HalvedModel(base, width), ("base", "antiexpert")))
    return found


def _drafter(models: Mapping[str, LoadedModel]) -> str | None:
    """The role of the member that drafts: the first expert, or another model than the base's."""
    others = [r for r in models if r != "base" and models[r].model is not models["base"].model]
    return next(iter([*experts_of(others), *others]), None)


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
    if spec.adapter is None or other is None or other.adapter is not None:
        return False
    return _same_weights(spec, other) and leaves_weights(spec)


def weights_of(
    role: str, specs: Mapping[str, ModelSpec], loaded: Mapping[str, LoadedModel]
) -> LoadedModel | None:
    """The loaded model whose weights a member of a system can use; None for none.

    Args:
        role: the member's.
        specs: of the whole system.
        loaded: the models that are loaded by now, by role.
    """
    if any(spec.adapter for spec in specs.values()):
        # An adapter changes the weights that it is put on: only its own pair shares them.
        return loaded.get(role.removesuffix("expert") + "antiexpert")
    found = (each for each in loaded.values() if same_checkpoint(specs[role], each.spec))
    return next(found, None)


def same_checkpoint(spec: ModelSpec, other: ModelSpec | None) -> bool:
    """Whether two specifications give the same weights, without an adapter; prompts may differ."""
    if other is None or spec.api or other.api or spec.adapter or other.adapter:
        return False
    return _same_weights(spec, other)


def _same_weights(spec: ModelSpec, other: ModelSpec) -> bool:
    names = ("revision", "dtype", "device", "quantization", "attn_implementation")
    alike = all(getattr(spec, name) == getattr(other, name) for name in names)
    return alike and _place(spec.id) == _place(other.id)


def _place(model_id: str) -> str:
    """A model's name; of a folder its one path, however it is written."""
    return str(Path(model_id).resolve()) if Path(model_id).is_dir() else model_id
