"""The Python API: load a model or a triple, and generate with it.

Example:
    generator = proxytune.load("base-model", expert="small-tuned", antiexpert="small-untuned")
    for generation in generator.generate(["The capital of France is"], max_new_tokens=20):
        print(generation.text)
"""

import logging
from collections.abc import Mapping
from functools import partial
from os import PathLike, fspath
from typing import Any

import torch
from transformers import PreTrainedModel

from proxytune.engine.generation import Generation
from proxytune.errors import UserError
from proxytune.formula import guidance
from proxytune.generator import Generator
from proxytune.loading.build import build, vocabulary_of, weights_of
from proxytune.loading.ends import in_words
from proxytune.loading.formulas import Alphas, lists_few, settle
from proxytune.loading.load import (
    check_endpoints,
    check_guidance,
    check_triple,
    load_member,
    load_tokenizer,
)
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import thinking
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import STRICT, check_kind, check_thinks
from proxytune.proxy import Formula
from proxytune.records import finite, make_decoding
from proxytune.roles import check_pair

log = logging.getLogger(__name__)

__all__ = ["Generation", "Generator", "load", "make_decoding"]

Source = str | PathLike[str] | ModelSpec | PreTrainedModel | LoadedModel


def load(
    base: Source,
    expert: Source | None = None,
    antiexpert: Source | None = None,
    alpha: Alphas = 1.0,
    *,
    formula: Formula | None = None,
    pairs: Mapping[str, tuple[Source, Source]] | None = None,
    vocabulary: str = STRICT,
    draft: Source | None = None,
    dtype: str = "auto",
    device: str | None = None,
    tokenizer: Any | None = None,
    cuda_graphs: bool = False,
) -> Generator:
    """Loads a single model, or a triple for proxy-tuning: base + alpha * (expert - antiexpert).

    Args:
        base: the large untuned model, or the single one: a path, a hub id, a `ModelSpec`, a
            loaded Hugging Face model, or a `LoadedModel` (from `loading.load.load_member`).
        expert: the small tuned model; give both `expert` and `antiexpert`, or neither.
        antiexpert: the small untuned model.
        alpha: scale on (expert - antiexpert); with several pairs, NAME -> its own scale.
        formula: another formula (`proxytune.formula`, or a function of one's own). It may need
            fewer helpers: `contrastive` an antiexpert, `guidance` none (the base is its own).
        pairs: NAME -> (expert, antiexpert), for several pairs; their roles are NAME_expert and
            NAME_antiexpert.
        vocabulary: "strict" refuses helpers whose tokens are not the base's; "special" lets added
            tokens have other names, and gives them no shift; "map" translates helpers of another
            family (docs/vocabularies.md).
        draft: a small model that drafts for a single `base`; it changes the speed alone. In a
            triple, the expert drafts (of several, the first).
        dtype: of models given by path or id: "auto" (the checkpoint's), float32, bfloat16 or
            float16.
        device: of models given by path or id: "cpu", "cuda:1", "auto" (all GPUs); None takes the
            first GPU or, without one, the CPU.
        tokenizer: of models that the caller has loaded; None takes the one named in the model.
        cuda_graphs: records the steps of each model that is on one GPU, and replays them
            (`members.graphs.RecordedSteps`).

    Raises:
        UserError: a model cannot be found, vocabularies differ, or the formula needs other
            models; raised before any weights are loaded.
    """
    if cuda_graphs and not torch.cuda.is_available():
        raise UserError("cuda_graphs=True needs a GPU, and none was found")
    if base is None:
        raise UserError("load needs a base: a path, a hub id, a ModelSpec or a model")
    helpers = _helpers(base, expert, antiexpert, formula, pairs)
    if helpers and draft is not None:
        raise UserError("draft is for a single model; a triple's own expert drafts for it")
    given = {"base": base, **helpers} | ({} if draft is None else {"draft": draft})
    sources = {role: _named(each, dtype, device) for role, each in given.items()}
    specs = {role: source for role, source in sources.items() if isinstance(source, ModelSpec)}
    check_kind(vocabulary)
    vocab_size = check_triple(specs, vocabulary if helpers else STRICT) if specs else None
    formats = {role: spec.format for role, spec in specs.items() if role != "draft"}
    check_thinks(vocabulary, thinking(formats))
    if helpers or formula is not None:  # `build` tries it on models that the caller has loaded
        settle(
            formula,
            alpha,
            list(helpers),
            few=lists_few(specs),
            vocab_size=vocab_size,
            vocabulary=vocabulary,
        )
        check_guidance(formula, specs)
    elif not isinstance(alpha, Mapping):
        finite("alpha", alpha)
    check_endpoints(specs)
    members = _load_all(sources, tokenizer)
    shared = vocabulary_of(members, vocabulary) if helpers or formula is not None else None
    rebuild = partial(build, members, alpha, formula=formula, vocabulary=shared)
    system = rebuild(cuda_graphs=cuda_graphs)
    if shared is not None and shared.end is not None:
        log.warning(in_words(shared.end, {role: each.tokenizer for role, each in members.items()}))
    if shared is not None and (line := shared.in_words()):
        log.warning(line)
    return Generator(members, system, rebuild, shared)


def arguments(members: Mapping[str, Any]) -> dict[str, Any]:
    """Models by their roles, as `load` takes them: those of pairs as `pairs`."""
    plain = {role: each for role, each in members.items() if "_" not in role}
    names = dict.fromkeys(role.rpartition("_")[0] for role in members if "_" in role)
    pairs = {name: (members[f"{name}_expert"], members[f"{name}_antiexpert"]) for name in names}
    return plain | ({"pairs": pairs} if pairs else {})


def _helpers(
    base: Source,
    expert: Source | None,
    antiexpert: Source | None,
    formula: Formula | None,
    pairs: Mapping[str, tuple[Source, Source]] | None,
) -> dict[str, Source]:
    """The models beside the base, by role; arguments as for `load`.

    Raises:
        UserError: a pair is incomplete, or has no usable name.
    """
    given = {"expert": expert, "antiexpert": antiexpert}
    helpers = {role: each for role, each in given.items() if each is not None}
    if formula is None and len(helpers) == 1:
        raise UserError("a triple needs both an expert and an antiexpert (or neither)")
    if formula is guidance and not helpers and not pairs:
        return {"antiexpert": base}
    for name, pair in (pairs or {}).items():
        check_pair(name)
        if helpers.keys() & {"expert", "antiexpert"} or len(pair) != 2:
            raise UserError(f"pairs[{name!r}] is (expert, antiexpert), without another expert")
        helpers |= {f"{name}_expert": pair[0], f"{name}_antiexpert": pair[1]}
    return helpers


def _load_all(sources: Mapping[str, Any], tokenizer: Any | None) -> dict[str, LoadedModel]:
    """Loads every source, each checkpoint once; the small models first, so that their errors show
    before the base is read.

    Args:
        sources: role -> what `_named` gives.
        tokenizer: of models that the caller has loaded.
    """
    members: dict[str, LoadedModel] = {}
    specs = {role: source for role, source in sources.items() if isinstance(source, ModelSpec)}
    for role in sorted(sources, key=lambda role: (role == "base", not role.endswith("antiexpert"))):
        share = weights_of(role, specs, members) if role in specs else None
        members[role] = _loaded(sources[role], share, tokenizer)
    return {role: members[role] for role in sources}


def _named(source: Source, dtype: str, device: str | None) -> Any:
    """The `ModelSpec` of a path or a hub id; every other source as it is."""
    named = isinstance(source, str | PathLike)
    return ModelSpec(fspath(source), dtype=dtype, device=device) if named else source


def _loaded(source: Any, share: LoadedModel | None, tokenizer: Any | None) -> LoadedModel:
    """Loads a source if need be.

    Args:
        source: see `Source`.
        share: see `load_member`.
        tokenizer: of a model that the caller has loaded.

    Raises:
        UserError: it is no source, or it cannot be found.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, ModelSpec):
        return load_member(source, share=share)
    if not isinstance(source, PreTrainedModel):
        raise UserError(f"cannot load {source!r}: give a path, a hub id, a ModelSpec or a model")
    name = source.config._name_or_path
    if tokenizer is None and name:
        tokenizer = load_tokenizer(ModelSpec(name))
    return LoadedModel(source.eval(), tokenizer)
