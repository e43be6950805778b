"""Loading: what a member is, whether a triple fits together, and its weights.

Everything that can be refused is refused from configurations and tokenizers alone, before the
first weight is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from proxytune.prompting import PromptFormat, encode, render_messages

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """Where one model comes from and how it is loaded.

    Attributes:
        id: a hub id or a local folder.
        revision: a branch, tag or commit of the hub repository.
        dtype: "auto" is the checkpoint's own; else float32, bfloat16 or float16.
        device: "cpu", "cuda:1", ...; "auto" spreads over all GPUs; None is the first GPU or,
            without one, the CPU.
        quantization: arguments of transformers' BitsAndBytesConfig ({"load_in_4bit": True}).
        adapter: the id or folder of a PEFT adapter for the model.
        adapter_revision: as `revision`, for the adapter.
        attn_implementation: "sdpa" or "eager"; None leaves it to transformers.
        trust_remote_code: lets the checkpoint bring its own modelling code.
        format: how prompts are rendered for it.
        api: settings of an OpenAI-compatible endpoint that serves the model; `id` then names its
            tokenizer.
    """

    id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization: Mapping[str, Any] | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    format: PromptFormat = field(default_factory=PromptFormat)
    api: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"a model is named by a folder or a hub id, not {self.id!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r}: rows of different lengths "
                "need explicit masks, which sdpa and eager take; leave it null"
            )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with what belongs to it.

    Attributes:
        model: the weights; None for a model that is elsewhere (behind an API).
        tokenizer: None where token ids are all that is needed.
        spec: where it came from; None for a model that the caller brought.
        member: what decodes, where that is not `model` itself: any `member.Member`.
    """

    model: PreTrainedModel | None
    tokenizer: Any | None
    spec: ModelSpec | None = None
    member: Any | None = None

    @property
    def format(self) -> PromptFormat:
        """How prompts are rendered for it."""
        return self.spec.format if self.spec else PromptFormat()

    @property
    def output_size(self) -> int | None:
        """Entries of its logits; None where unknown."""
        return self.model.config.get_text_config().vocab_size if self.model is not None else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a completion: the generation config's and the tokenizer's."""
        configs = [] if self.model is None else [self.model.generation_config, self.model.config]
        found = [getattr(config, "eos_token_id", None) for config in configs]
        found.append(getattr(self.tokenizer, "eos_token_id", None))
        lists = [each if isinstance(each, list | tuple) else [each] for each in found]
        lists.append(sorted(getattr(self.member, "eos_ids", ())))
        return frozenset(int(i) for each in lists for i in each if i is not None)

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: the model came without one.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this needs a tokenizer: give load(..., tokenizer=...), or token ids as prompts"
            )
        return self.tokenizer

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, with the tokenizer's own special tokens (a BOS)."""
        return self.need_tokenizer()(text)["input_ids"]

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation in this member's prompt format."""
        tokenizer = self.need_tokenizer()
        return encode(render_messages(messages, self.format, tokenizer), tokenizer)


def check_triple(specs: Mapping[str, ModelSpec]) -> int:
    """Checks, before any weights are loaded, that models can be combined.

    Args:
        specs: role -> model; any set of roles.

    Returns:
        The length of the vocabulary that all of them share; logits are cut to it.

    Raises:
        ValueError: a device, a model or an adapter cannot be found, two vocabularies differ (the
            first differing token is named), or an API cannot be used.
    """
    for role, spec in specs.items():
        _check_device(role, spec.device)
    tokenizers, sizes = {}, {}
    for role, spec in specs.items():
        if spec.api is not None and role in ("expert", "antiexpert", "draft"):
            raise ValueError(f"the {role} cannot be behind an API: it has to run on this machine")
        if spec.api is None:
            sizes[role] = _load_config(role, spec).get_text_config().vocab_size
        tokenizers[role] = load_tokenizer(spec, role)
        if spec.adapter is not None:
            _check_adapter(role, spec)
    common = common_vocabulary(tokenizers, sizes)
    for role, spec in specs.items():
        if spec.api is not None:
            from proxytune.api_base import open_api

            open_api(spec, tokenizers[role])
    return common


def common_vocabulary(tokenizers: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """The number of token ids that mean the same to every member.

    Logits are often padded beyond the tokenizer, and a tuned model may have tokens of its own
    behind the shared ones (CodeLlama's infilling tokens behind Llama-2's 32,000): both are cut.

    Args:
        tokenizers: role -> tokenizer; None for unknown.
        sizes: role -> rows of the model's output; a role may be missing.

    Raises:
        ValueError: a token id below the common length means different things to two members, or
            text that the base can write lies above it.
    """
    known = {role: tokenizer for role, tokenizer in tokenizers.items() if tokenizer is not None}
    tables = {role: tokenizer.get_vocab() for role, tokenizer in known.items()}
    lengths = {role: max(table.values()) + 1 for role, table in tables.items()}
    common = min([*lengths.values(), *sizes.values()])
    if not tables:
        return common
    first_role, *others = sorted(tables, key=lambda role: role != "base")
    words = {role: _by_id(table, common) for role, table in tables.items()}
    for role in others:
        if words[role] == words[first_role]:
            continue
        pairs = enumerate(zip(words[first_role], words[role], strict=True))
        token_id, (mine, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"the vocabularies differ: token {token_id} is {mine!r} to the {first_role} and "
            f"{theirs!r} to the {role}; proxy-tuning needs models of one tokenizer"
        )
    added = {token.content for token in known[first_role].added_tokens_decoder.values()}
    beyond = {i: w for w, i in tables[first_role].items() if i >= common and w not in added}
    if beyond:
        lost = min(beyond)
        ends = {role: min(lengths[role], sizes.get(role, lengths[role])) for role in tables}
        short = min(ends, key=lambda role: ends[role])
        raise ValueError(
            f"the vocabularies differ: the {first_role} has the token {beyond[lost]!r} "
            f"(id {lost}), but the {short} ends at id {common - 1}; "
            "proxy-tuning needs models of one tokenizer"
        )
    return common


def _by_id(table: Mapping[str, int], length: int) -> list[str | None]:
    words: list[str | None] = [None] * length
    for word, token_id in table.items():
        if token_id < length:
            words[token_id] = word
    return words


def load_tokenizer(spec: ModelSpec, role: str = "model") -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: there is none, in one line with the way out.
    """
    try:
        return AutoTokenizer.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_not_found(role, spec.id, "tokenizer", error)) from error


def load_member(spec: ModelSpec, share: LoadedModel | None = None) -> LoadedModel:
    """Loads one model and its tokenizer.

    Args:
        spec: what to load.
        share: a loaded model of the same checkpoint; an adapter is then put on its weights, of
            which there stays one copy.

    Raises:
        ValueError: it cannot be found or read, in one line with the way out.
    """
    if spec.api is not None:
        from proxytune.api_base import open_api

        tokenizer = load_tokenizer(spec)
        return LoadedModel(None, tokenizer, spec, open_api(spec, tokenizer))
    tokenizer = load_tokenizer(spec)
    model = share.model if share is not None and shares_weights(spec, share.spec) else None
    if model is None:
        model = _load_weights(spec)
    if spec.adapter is not None:
        model = _put_adapter(model, spec)
    return LoadedModel(model, tokenizer, spec)


def shares_weights(spec: ModelSpec, other: ModelSpec | None) -> bool:
    """Whether `spec` is an adapter on the very checkpoint that `other` loads."""
    if other is None or spec.adapter is None or other.adapter is not None:
        return False
    names = ("id", "revision", "dtype", "device", "quantization", "attn_implementation")
    return all(getattr(spec, name) == getattr(other, name) for name in names)


def _load_weights(spec: ModelSpec) -> PreTrainedModel:
    options: dict[str, Any] = {
        "revision": spec.revision,
        "dtype": spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**spec.quantization)
    device = spec.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(spec.id, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_not_found("model", spec.id, "weights", error)) from error
    return model.eval().requires_grad_(False)


def _put_adapter(model: PreTrainedModel, spec: ModelSpec) -> Any:
    from peft import PeftModel

    assert spec.adapter is not None
    adapted = PeftModel.from_pretrained(model, spec.adapter, revision=spec.adapter_revision)
    # The adapter now sits inside `model`, too: whoever uses that one alone has to switch it off.
    # In a list, because a module must not become a submodule of its own part.
    model.adapted_by = [adapted]  # pyright: ignore[reportArgumentType]
    return adapted.eval().requires_grad_(False)


def _load_config(role: str, spec: ModelSpec) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(role, spec.id, "config.json", error)) from error
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kinds = {type(config), type(config.get_text_config())}
    if not own_code and kinds.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(f"{role}: {spec.id} ({config.model_type}) is no causal language model")
    return config


def _check_device(role: str, name: str | None) -> None:
    if name in (None, "auto"):
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{role}: {name!r} is no device; give auto, cpu or cuda:NUMBER") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        message = f"{role}: there is no device {name} here ({count} GPUs)"
        raise ValueError(f"{message}; machine=cpu, or device='cpu', runs without one")


def _check_adapter(role: str, spec: ModelSpec) -> None:
    from peft import PeftConfig

    assert spec.adapter is not None
    try:
        PeftConfig.from_pretrained(spec.adapter, revision=spec.adapter_revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(role, spec.adapter, "adapter", error)) from error


def _not_found(role: str, name: str, what: str, error: BaseException) -> str:
    """One line: what is missing, and what to do about it."""
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
