"""The Python API: load a model or a triple, and generate with it.

Example:
    generator = proxytune.load("base-model", expert="small-tuned", antiexpert="small-untuned")
    for generation in generator.generate(["The capital of France is"], max_new_tokens=20):
        print(generation.text)
"""

import logging
from os import PathLike, fspath
from typing import Any

import torch
from transformers import PreTrainedModel

from proxytune.errors import UserError
from proxytune.generator import Generation, Generator, make_decoding
from proxytune.loading.build import build
from proxytune.loading.ends import in_words
from proxytune.loading.load import check_endpoints, check_triple, load_member, load_tokenizer
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.proxy import ProxyTunedModel
from proxytune.records import finite

log = logging.getLogger(__name__)

__all__ = ["Generation", "Generator", "load", "make_decoding"]

Source = str | PathLike[str] | ModelSpec | PreTrainedModel | LoadedModel


def load(
    base: Source,
    expert: Source | None = None,
    antiexpert: Source | None = None,
    alpha: float = 1.0,
    *,
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
        alpha: scale on (expert - antiexpert).
        draft: a small model that drafts for a single `base`; it changes the speed alone. In a
            triple, the expert drafts.
        dtype: of models given by path or id: "auto" (the checkpoint's), float32, bfloat16 or
            float16.
        device: of models given by path or id: "cpu", "cuda:1", "auto" (all GPUs); None takes the
            first GPU or, without one, the CPU.
        tokenizer: of models that the caller has loaded; None takes the one named in the model.
        cuda_graphs: records the steps of each model that is on one GPU, and replays them
            (`members.graphs.RecordedSteps`).

    Raises:
        UserError: a model cannot be found, or vocabularies differ; raised before any weights are
            loaded.
    """
    if (expert is None) != (antiexpert is None):
        raise UserError("a triple needs both an expert and an antiexpert (or neither)")
    if expert is not None and draft is not None:
        raise UserError("draft is for a single model; a triple's own expert drafts for it")
    if cuda_graphs and not torch.cuda.is_available():
        raise UserError("cuda_graphs=True needs a GPU, and none was found")
    if base is None:
        raise UserError("load needs a base: a path, a hub id, a ModelSpec or a model")
    alpha = finite("alpha", alpha)
    given = {"base": base, "expert": expert, "antiexpert": antiexpert, "draft": draft}
    sources = {
        role: _named(each, dtype, device) for role, each in given.items() if each is not None
    }
    specs = {role: source for role, source in sources.items() if isinstance(source, ModelSpec)}
    if specs:
        check_triple(specs)
        check_endpoints(specs)
    members: dict[str, LoadedModel] = {}
    # The small models first, so that their errors show before the large one is read.
    for role in ("antiexpert", "expert", "draft", "base"):
        if role in sources:
            members[role] = _loaded(sources[role], members.get("antiexpert"), tokenizer)
    members = {role: members[role] for role in sources}
    system = build(members, alpha, cuda_graphs)
    if isinstance(system, ProxyTunedModel) and system.end is not None:
        log.warning(in_words(system.end, {role: each.tokenizer for role, each in members.items()}))
    return Generator(members, system)


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
