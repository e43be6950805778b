"""Loading: checks whether models fit together, then reads their weights.

The checks need only configurations and tokenizers, so a mistake shows before the first weight is
read.
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from proxytune.engine.system import Member
from proxytune.errors import UserError, extra, need
from proxytune.loading.build import shares_weights
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary


def check_triple(specs: Mapping[str, ModelSpec]) -> int:
    """Checks that models can be combined, before any weights are loaded.

    Args:
        specs: role -> model; any set of roles.

    Returns:
        The length of the vocabulary that all of them share. Logits are cut to it.

    Raises:
        UserError: a device, a model or an adapter cannot be found, or two vocabularies differ
            (the first differing token is named).
    """
    for role, spec in specs.items():
        _check_device(role, spec.device)
        _check_quantization(role, spec)
    tokenizers, sizes = {}, {}
    for role, spec in specs.items():
        if spec.api is not None and role in ("expert", "antiexpert", "draft"):
            raise UserError(f"the {role} cannot be behind an API: it has to run on this machine")
        if spec.api is None:
            sizes[role] = _load_config(role, spec).get_text_config().vocab_size
        tokenizers[role] = load_tokenizer(spec, role)
        if spec.adapter is not None:
            _check_adapter(role, spec)
    return common_vocabulary(tokenizers, sizes)


def check_endpoints(specs: Mapping[str, ModelSpec]) -> None:
    """Sends every endpoint a cheap request, to check that it can serve its model.

    Args:
        specs: role -> model; models without an endpoint are skipped.

    Raises:
        UserError: an endpoint cannot be reached, refuses the key, does not know the model, or
            lists too few log-probabilities.
    """
    for role, spec in specs.items():
        if spec.api is not None:
            _open(spec, load_tokenizer(spec, role))


def load_tokenizer(spec: ModelSpec, role: str = "model") -> Any:
    """The tokenizer of a model.

    Args:
        spec: the model.
        role: names the model in the message.

    Raises:
        UserError: there is none; one line with the way out.
    """
    try:
        return AutoTokenizer.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_found(role, spec.id, "tokenizer", error)) from error


def load_member(spec: ModelSpec, share: LoadedModel | None = None) -> LoadedModel:
    """Loads one model and its tokenizer.

    Args:
        spec: the model.
        share: a loaded model. If `spec` is an adapter on its checkpoint, the adapter uses these
            weights instead of a second copy.

    Raises:
        UserError: it cannot be found or read; one line with the way out.
    """
    tokenizer = load_tokenizer(spec)
    if spec.api is not None:
        return LoadedModel(None, tokenizer, spec, _open(spec, tokenizer))
    if share is not None and share.model is not None and shares_weights(spec, share.spec):
        share.adapted = _put_adapter(share.model, spec)
        return LoadedModel(share.adapted, tokenizer, spec)
    model = _load_weights(spec)
    return LoadedModel(_put_adapter(model, spec) if spec.adapter else model, tokenizer, spec)


def _open(spec: ModelSpec, tokenizer: Any) -> Member:
    """A member behind an API; the import is here because only such members need a client."""
    from proxytune.members.api.member import open_api

    return open_api(spec, tokenizer)


def _load_weights(spec: ModelSpec) -> PreTrainedModel:
    options: dict[str, Any] = {
        "revision": spec.revision,
        "dtype": spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**spec.quantization)
    device = spec.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(spec.id, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_found("model", spec.id, "weights", error)) from error
    return model.eval().requires_grad_(False)


def _put_adapter(model: PreTrainedModel, spec: ModelSpec) -> Any:
    with extra("adapters", "an adapter"):
        from peft import PeftModel

    assert spec.adapter is not None
    adapted = PeftModel.from_pretrained(model, spec.adapter, revision=spec.adapter_revision)
    return adapted.eval().requires_grad_(False)


def _load_config(role: str, spec: ModelSpec) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_not_found(role, spec.id, "config.json", error)) from error
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kinds = {type(config), type(config.get_text_config())}
    if not own_code and kinds.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UserError(f"{role}: {spec.id} ({config.model_type}) is no causal language model")
    return config


def _check_device(role: str, name: str | None) -> None:
    if name in (None, "auto"):
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{role}: {name!r} is no device; give auto, cpu or cuda:NUMBER") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        message = f"{role}: there is no device {name} here ({count} GPUs)"
        raise UserError(f"{message}; machine=cpu, or device='cpu', runs without one")


def _check_quantization(role: str, spec: ModelSpec) -> None:
    if not spec.quantization:
        return
    known = list(signature(BitsAndBytesConfig).parameters)[:-1]  # the last takes anything
    for name in spec.quantization:
        if name not in known:
            raise UserError(f"{role}: quantization has no {name!r}; there are {', '.join(known)}")
    need("bitsandbytes", "quantization", f"{role}: quantization")


def _check_adapter(role: str, spec: ModelSpec) -> None:
    with extra("adapters", f"{role}: an adapter"):
        from peft import PeftConfig

    assert spec.adapter is not None
    try:
        PeftConfig.from_pretrained(spec.adapter, revision=spec.adapter_revision)
    except (OSError, ValueError) as error:
        raise UserError(_not_found(role, spec.adapter, "adapter", error)) from error


def _not_found(role: str, name: str, what: str, error: BaseException) -> str:
    """One line that names the missing file and the way out.

    Args:
        role: of the model.
        name: a hub id or a folder.
        what: the missing part ("tokenizer", "weights", ...).
        error: the error of transformers or PEFT.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{role}: the folder {name} has no usable {what} ({detail})"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{role}: there is no folder {name}; give the path of a model or a hub id"
    text = str(error).lower()
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{role}: {name} is gated on the hub: accept its terms on "
            f"https://huggingface.co/{name} and log in (`hf auth login`, or HF_TOKEN)"
        )
    return (
        f"{role}: {name} is neither a local folder nor a model that can be had from the hub "
        f"({what}); check the name, the network and HF_HUB_OFFLINE, or log in for private models"
    )
