"""Adapters (PEFT): whether an adapter fits its model, before weights; whether it arrived, after.

PEFT loads what fits by name and leaves the rest at its initial value, with a warning at most. So
the names and shapes in the adapter's file are compared with those that a model without weights (on
torch's meta device) would have under the same adapter configuration.
"""

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxytune.errors import UserError, extra
from proxytune.loading.adapter_files import file_of, shapes_of, tensors_of
from proxytune.loading.missing import not_found
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary

log = logging.getLogger(__name__)

_SHOWN = 3  # tensors named in an error
# These change more than the weights of modules: the prompt's length, or the forward pass itself.
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")
_NO_WEIGHTS = ("ADAPTION_PROMPT", "POLY", "XLORA", "CPT")


def check_adapter(role: str, spec: ModelSpec, config: Any, tokenizer: Any) -> None:
    """Refuses an adapter that does not fit its model; reads the adapter's file, but no weights.

    Args:
        role: of the model, for messages.
        spec: the model and its adapter.
        config: the model's configuration.
        tokenizer: the model's own.

    Raises:
        UserError: the adapter is of a kind that cannot be used, its tensors do not fit the model
            (the first ones are named), it changes nothing, or its tokenizer is another one.
    """
    adapter = _adapter_config(role, spec)
    kind = _plain(adapter.peft_type)
    if adapter.is_prompt_learning or kind in _NO_WEIGHTS:
        raise UserError(
            f"{role}: {spec.adapter} is a {kind} adapter, which changes the prompt or the forward "
            "pass; adapters that change weights (LoRA and its kin) can be used"
        )
    if getattr(adapter, "alora_invocation_tokens", None):
        raise UserError(
            f"{role}: {spec.adapter} is an activated LoRA (alora_invocation_tokens), which acts "
            "on a part of the text alone; it cannot be used here"
        )
    shapes = shapes_of(role, spec)
    whole = _check_fit(role, spec, adapter, config, shapes)
    scales = [getattr(adapter, "lora_alpha", 1), *getattr(adapter, "alpha_pattern", {}).values()]
    if not any(scales) and not whole:
        raise UserError(
            f"{role}: the adapter {spec.adapter} changes nothing: its lora_alpha, which scales it, "
            "is 0 in adapter_config.json"
        )
    _check_values(role, spec, whole)
    trained_on = adapter.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(spec.id).name:
        log.warning(
            "%s: the adapter %s was trained on %s; here it adapts %s",
            role,
            spec.adapter,
            trained_on,
            spec.id,
        )
    rows = config.get_text_config().vocab_size
    _check_tokenizer(role, spec, tokenizer, rows)


def leaves_weights(spec: ModelSpec) -> bool:
    """Whether an adapter leaves the weights of its model as they are, and works row by row.

    Only such an adapter may act on a model that another member uses, too. Others (DoRA, retrained
    modules, biases or embeddings, initial values made from the weights) get a copy of their own.
    """
    config = _adapter_config("expert", spec)
    unusual = (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "lora_bias",
        "alora_invocation_tokens",
    )
    return (
        _plain(config.peft_type) == "LORA"
        and getattr(config, "bias", "none") == "none"
        and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")
        and not any(getattr(config, name, None) for name in unusual)
        and all(".lora_" in name for name in shapes_of("expert", spec))
    )


def put_adapter(model: Any, spec: ModelSpec) -> Any:
    """The model with its adapter.

    Raises:
        UserError: a tensor of the adapter is not in the model as it stands in the file.
    """
    with extra("adapters", "an adapter"):
        from peft import PeftModel

    assert spec.adapter is not None
    adapted = PeftModel.from_pretrained(model, spec.adapter, revision=spec.adapter_revision)
    wanted = _held(adapted)
    held = adapted.state_dict() | wanted
    lost = []
    for name, tensor in tensors_of("model", spec):
        here = held.get(name)
        wanted.pop(name, None)
        if here is None:
            lost.append(name)
        elif not here.is_meta and not torch.equal(here.cpu(), tensor.to(here.dtype)):  # offloaded
            raise _not_arrived(spec, name)
    # PEFT renames the tensors of fused layers. Then others have been filled in their place.
    filled = [bool(tensor.any()) for name, tensor in wanted.items() if "_A" not in name]
    if lost and not (filled and all(filled)):
        raise _not_arrived(spec, lost[0])
    adapted = adapted.eval().requires_grad_(False)
    _refuse_idle(adapted, spec)
    return adapted


def _refuse_idle(adapted: Any, spec: ModelSpec) -> None:
    """Refuses an adapter that changes no logit, which `_check_values` sees of most LoRAs before.

    Raises:
        UserError: the adapter is at its initial value, or all its scales are zero.
    """
    config = adapted.active_peft_config
    tokens: list[int] = []  # those that an adapter may be about alone come first
    for name in ("token_indices", "trainable_token_indices"):
        trained = getattr(config, name, None) or []
        lists = trained.values() if isinstance(trained, Mapping) else [trained]
        tokens += [token for each in lists for token in each][:64]
    ids = torch.tensor([[*tokens, *range(1, 9)]], device=adapted.device)
    with torch.no_grad():
        with_it = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    if torch.equal(with_it, without):
        raise UserError(
            f"the adapter {spec.adapter} changes nothing: {spec.id} gives the same logits without "
            "it; it was saved before it was trained, or its scales are zero"
        )


def _not_arrived(spec: ModelSpec, name: str) -> UserError:
    return UserError(
        f"{spec.adapter}: its tensor {name} has not arrived in {spec.id}; merge the adapter into "
        "a whole model (merge_and_unload) and give that"
    )


def adapter_tokenizer(spec: ModelSpec, own: Any, local_files_only: bool = False) -> Any:
    """The tokenizer of an adapted model: the adapter's, or else the model's own.

    An adapter is trained with the tokenizer and the chat template of its own folder. A folder that
    has the template alone lends it to the model's tokenizer.

    Args:
        spec: the model and its adapter.
        own: the tokenizer of the model.
        local_files_only: asks no hub.
    """
    if file_of(spec, "tokenizer_config.json", local_files_only) is not None:
        try:
            return AutoTokenizer.from_pretrained(
                spec.adapter,
                revision=spec.adapter_revision,
                trust_remote_code=spec.trust_remote_code,
                local_files_only=local_files_only,
            )
        except (OSError, ValueError, ImportError) as error:
            log.warning(
                "the tokenizer of the adapter %s cannot be loaded (%s): that of %s is used",
                spec.adapter,
                str(error).strip().partition("\n")[0],
                spec.id,
            )
    template = file_of(spec, "chat_template.jinja", local_files_only)
    if template is not None:
        own.chat_template = template.read_text(encoding="utf-8")
    return own


def _adapter_config(role: str, spec: ModelSpec) -> Any:
    """The adapter's configuration.

    Raises:
        UserError: there is none; other adapters in the folder are named.
    """
    with extra("adapters", f"{role}: an adapter"):
        from peft import PeftConfig

    assert spec.adapter is not None
    try:
        return PeftConfig.from_pretrained(spec.adapter, revision=spec.adapter_revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = not_found(role, spec.adapter, "adapter", error)
        inner = sorted(Path(spec.adapter).expanduser().glob("*/adapter_config.json"))
        if inner:
            message += f"; it holds {', '.join(str(path.parent) for path in inner)}"
        raise UserError(message) from error


def _check_fit(
    role: str, spec: ModelSpec, adapter: Any, config: Any, shapes: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Compares the adapter's tensors with those that the model has for it.

    Returns:
        Those of the adapter's tensors that replace tensors of the model (embeddings, biases).

    Raises:
        UserError: they do not fit.
    """
    adapted = _without_weights(role, spec, adapter, config)
    wanted = {name: list(tensor.shape) for name, tensor in _held(adapted).items()}
    own = {name: list(tensor.shape) for name, tensor in adapted.state_dict().items()}
    known = own | wanted
    where = f"{role}: the adapter {spec.adapter} does not fit {spec.id}"
    other = [name for name in shapes if name in known and shapes[name] != known[name]]
    if other:
        name = other[0]
        embeds = not any(mark in name for mark in ("lora", "modules_to_save")) and name in own
        hint = (
            "its embeddings were resized; merge it into a whole model (merge_and_unload)"
            if embeds
            else "it was made for a model of another size, or with another rank"
        )
        raise UserError(
            f"{where}: {name} is {_size(shapes[name])}, the model wants {_size(known[name])} "
            f"({len(other)} tensors differ); {hint}"
        )
    unknown = [name for name in shapes if name not in known]
    missing = [name for name in wanted if name not in shapes]
    if (unknown or missing) and not _renamed(adapted, shapes):
        found = f"{len(unknown)} of its {len(shapes)} tensors belong to no module of the model"
        lack = f"{len(missing)} of {len(wanted)} that adapter_config.json asks for are missing"
        parts = [f"{found} ({_some(unknown)})"] if unknown else []
        parts += [f"{lack} ({_some(missing)})"] if missing else []
        raise UserError(f"{where}: {'; '.join(parts)}; export it again with PEFT's save_pretrained")
    return {name: shape for name, shape in shapes.items() if name in own and name not in wanted}


def _without_weights(role: str, spec: ModelSpec, adapter: Any, config: Any) -> Any:
    """The adapted model on the meta device: names and shapes without memory.

    Raises:
        UserError: the adapter's target modules are not in the model.
    """
    from peft import get_peft_model

    adapter = copy.deepcopy(adapter)
    if hasattr(adapter, "init_lora_weights"):
        adapter.init_lora_weights = True  # some initial values need the weights
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        try:
            return get_peft_model(model, adapter)
        except ValueError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{role}: the adapter {spec.adapter} does not fit {spec.id}: {reason}"
            ) from error


def _renamed(adapted: Any, shapes: Mapping[str, list[int]]) -> bool:
    """Whether PEFT itself gives every tensor its place under another name, as in fused experts."""
    from peft import set_peft_model_state_dict

    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        result = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    except (RuntimeError, KeyError, ValueError):
        return False
    prefix = getattr(adapted.base_model, "prefix", "lora_")
    lacking = [name for name in result.missing_keys if prefix in name]
    return not result.unexpected_keys and not lacking


def _held(adapted: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors inside of an adapted model, named as in its file."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def _check_values(role: str, spec: ModelSpec, whole: Mapping[str, list[int]]) -> None:
    """Refuses an adapter of NaN, or one that was saved before it learned anything.

    Args:
        role: of the model.
        spec: the model and its adapter.
        whole: tensors that replace those of the model; with them it does something.
    """
    idle: dict[str, str] = {}  # module -> its tensor of zeros
    count, others = 0, bool(whole)
    for name, tensor in tensors_of(role, spec):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{role}: the adapter {spec.adapter} holds NaN or infinity in {name}")
        factor = _FACTOR.search(name)
        if factor is None:
            others = True
            continue
        count += factor[1] == "B"
        if not bool(tensor.any()):
            idle.setdefault(name[: factor.start()], name)
    zero, names = len(idle), _some([*idle.values()])
    which = "lora_A or lora_B" if any("_A" in name for name in idle.values()) else "lora_B"
    if zero and zero == count and not others:
        raise UserError(
            f"{role}: the adapter {spec.adapter} changes nothing: all {count} of its {which} are "
            f"zero ({names}); so is every lora_B before it was trained"
        )
    if zero:
        log.warning(
            "%s: %d of %d modules of the adapter %s change nothing: their %s are zero (%s)",
            role,
            zero,
            count,
            spec.adapter,
            which,
            names,
        )


def _check_tokenizer(role: str, spec: ModelSpec, own: Any, rows: int) -> None:
    """Refuses an adapter whose tokenizer is not its model's; says whose chat template is used.

    Args:
        role: of the model.
        spec: the model and its adapter.
        own: the model's tokenizer.
        rows: of the model's embedding.
    """
    before = own.chat_template
    theirs = adapter_tokenizer(spec, own)
    if theirs is not own:
        both = {f"{role}'s model": own, f"{role}'s adapter": theirs}
        common_vocabulary(both, {}, way_out=False)
        last = max(theirs.get_vocab().values())
        if last >= rows:
            raise UserError(
                f"{role}: the tokenizer of the adapter {spec.adapter} has token {last}, and the "
                f"embedding of {spec.id} ends at {rows - 1}; merge the adapter into a whole model "
                "(merge_and_unload) whose embedding was resized"
            )
    if theirs.chat_template != before:
        log.warning("%s: the chat template is that of the adapter %s", role, spec.adapter)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _size(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _plain(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type)).upper()
