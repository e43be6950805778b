"""Loading: checks whether models fit together, then reads their weights.

The checks need only configurations and tokenizers, so a mistake shows before the first weight is
read.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from inspect import signature
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from proxytune.engine.system import Member
from proxytune.errors import UserError, need
from proxytune.formula import guidance
from proxytune.loading.adapters import adapter_tokenizer, check_adapter, put_adapter
from proxytune.loading.build import same_checkpoint, shares_weights
from proxytune.loading.ends import end_ids
from proxytune.loading.launched import RANKS
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.missing import not_found
from proxytune.loading.prompting import render_messages, template_of
from proxytune.loading.ranks import check_parts, distributed_config
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import (
    STRICT,
    Vocabulary,
    check_kind,
    common_vocabulary,
    settle_vocabulary,
)

log = logging.getLogger(__name__)


def check_triple(specs: Mapping[str, ModelSpec], vocabulary: str = STRICT) -> int:
    """Checks that models can be combined, before any weights are loaded.

    Args:
        specs: role -> model; any set of roles.
        vocabulary: see `proxytune.load`.

    Returns:
        The length of the vocabulary that all of them share. Logits are cut to it.

    Raises:
        UserError: a device, a model or an adapter cannot be found, an adapter does not fit, a
            chat template cannot be used, or two vocabularies differ (the first differing token is
            named).
    """
    check_kind(vocabulary)
    for role, spec in specs.items():
        _check_device(role, spec.device)
        _check_quantization(role, spec)
    tokenizers, sizes = {}, {}
    for role, spec in specs.items():
        if spec.api is not None and (role.endswith("expert") or role == "draft"):
            raise UserError(f"the {role} cannot be behind an API: it has to run on this machine")
        if spec.api is not None and spec.adapter is not None:
            raise UserError(f"{role}: adapter={spec.adapter} needs the model on this machine")
        if spec.api is None:
            config = load_config(role, spec)
            sizes[role] = config.get_text_config().vocab_size
            if spec.device == RANKS:
                check_parts(role, config)
            if spec.adapter is not None:
                check_adapter(role, spec, config, _own_tokenizer(spec, role))
        tokenizers[role] = load_tokenizer(spec, role)
        _check_template(role, spec, tokenizers[role])
    return common_vocabulary(tokenizers, sizes, vocabulary)


def find_vocabulary(specs: Mapping[str, ModelSpec], kind: str = STRICT) -> Vocabulary:
    """The vocabulary that a base and these helpers will have; reads no weights.

    Args:
        specs: role -> model, as `check_triple` has accepted them.
        kind: see `proxytune.load`.
    """
    tokenizers, sizes, ends = {}, {}, {}
    for role, spec in specs.items():
        tokenizers[role], configs = load_tokenizer(spec, role), []
        if spec.api is None:
            configs = [load_config(role, spec)]
            sizes[role] = configs[0].get_text_config().vocab_size
        configs += generation_configs(spec)
        ends[role] = end_ids(tokenizers[role], *configs)
    formats = {role: spec.format for role, spec in specs.items()}
    return settle_vocabulary(kind, tokenizers, sizes, ends, formats)


def generation_configs(spec: ModelSpec) -> list[GenerationConfig]:
    """The generation configuration of a checkpoint; many have none."""
    with suppress(OSError):
        return [GenerationConfig.from_pretrained(spec.id, revision=spec.revision or "main")]
    return []


def check_guidance(formula: Any, specs: Mapping[str, ModelSpec]) -> None:
    """Refuses `guidance` of two models: it combines two prompts of one.

    Args:
        formula: any.
        specs: role -> model; a role may be left out.

    Raises:
        UserError: the antiexpert is another checkpoint than the base.
    """
    base, other = specs.get("base"), specs.get("antiexpert")
    if formula is guidance and base and other and not same_checkpoint(other, base):
        raise UserError(
            "formula=guidance combines two prompts of one model, and the antiexpert is another "
            f"checkpoint than the base ({other.id}); give it the base's "
            f"(triple.antiexpert.id={base.id}), and a format of its own"
        )


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
    """The tokenizer of a model; that of its adapter, where the adapter has one.

    Args:
        spec: the model.
        role: names the model in the message.

    Raises:
        UserError: there is none; one line with the way out.
    """
    own = _own_tokenizer(spec, role)
    return own if spec.adapter is None else adapter_tokenizer(spec, own)


def _own_tokenizer(spec: ModelSpec, role: str) -> Any:
    """The tokenizer of a model without its adapter."""
    try:
        return AutoTokenizer.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(not_found(role, spec.id, "tokenizer", error)) from error


def load_member(spec: ModelSpec, share: LoadedModel | None = None) -> LoadedModel:
    """Loads one model and its tokenizer.

    Args:
        spec: the model.
        share: a loaded model. If `spec` is its checkpoint under other prompts, or an adapter on
            its checkpoint, it uses these weights instead of a second copy.

    Raises:
        UserError: it cannot be found or read; one line with the way out.
    """
    tokenizer = load_tokenizer(spec)
    if spec.api is not None:
        return LoadedModel(None, tokenizer, spec, _open(spec, tokenizer))
    if share is not None and same_checkpoint(spec, share.spec):
        return LoadedModel(share.model, tokenizer, spec)
    if share is not None and share.model is not None and shares_weights(spec, share.spec):
        share.adapted = put_adapter(share.model, spec)
        return LoadedModel(share.adapted, tokenizer, spec)
    model = _load_weights(spec)
    return LoadedModel(put_adapter(model, spec) if spec.adapter else model, tokenizer, spec)


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
    if device == RANKS:
        options["distributed_config"] = distributed_config()
    elif device != "cpu":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    if spec.max_memory:
        options["max_memory"] = spec.max_memory
    try:
        model = AutoModelForCausalLM.from_pretrained(spec.id, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(not_found("model", spec.id, "weights", error)) from error
    return model.eval().requires_grad_(False)


def load_config(role: str, spec: ModelSpec) -> Any:
    """The configuration of a checkpoint.

    Args:
        role: names the model in the message.
        spec: the model.

    Raises:
        UserError: there is none, or it is not that of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(not_found(role, spec.id, "config.json", error)) from error
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kinds = {type(config), type(config.get_text_config())}
    # `in` asks for one class; a walk over the mapping would import every model's configuration.
    if not own_code and not any(kind in MODEL_FOR_CAUSAL_LM_MAPPING for kind in kinds):
        raise UserError(f"{role}: {spec.id} ({config.model_type}) is no causal language model")
    return config


def _check_template(role: str, spec: ModelSpec, tokenizer: Any) -> None:
    """Refuses a chat template that is missing, or does not even render a turn of the user."""
    if spec.format.kind != "chat":
        return
    try:
        rendered = render_messages([{"role": "user", "content": "Hello"}], spec.format, tokenizer)
    except UserError as error:
        raise UserError(f"{role}: {error}") from error
    if "hello" not in rendered.text.lower():
        raise UserError(
            f"{role}: the chat template of {spec.id} leaves out what the user says (of 'Hello' it "
            f"makes {rendered.text[:80]!r}); give another template (format.chat_template=...), or "
            "format.kind=raw"
        )
    template = template_of(spec.format, tokenizer) or tokenizer.get_chat_template()
    if "strftime_now" in template and str(date.today().year) in rendered.text:
        log.warning(
            "%s: the chat template of %s writes today's date into every prompt, so runs of two "
            "days differ; give the date (format.template_kwargs={date_string: ...}, or as the "
            "template calls it)",
            role,
            spec.id,
        )


def _check_device(role: str, name: str | None) -> None:
    if name in (None, "auto", RANKS):
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
