"""A model before it is loaded (`ModelSpec`), and after (`LoadedModel`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel

from proxytune.engine.system import Member
from proxytune.errors import UserError
from proxytune.loading.prompting import PromptFormat
from proxytune.members.api.settings import ApiSettings, settings_of

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
        api: the OpenAI-compatible endpoint that serves the model (`ApiSettings`, or a mapping of
            its fields); `id` then names its tokenizer.
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
    api: ApiSettings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise UserError(f"a model is named by a folder or a hub id, not {self.id!r}")
        if isinstance(self.api, Mapping):
            object.__setattr__(self, "api", settings_of(self.api))
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.attn_implementation not in (None, "sdpa", "eager"):
            raise UserError(
                f"attn_implementation={self.attn_implementation!r}: rows of different lengths "
                "need explicit masks, which sdpa and eager take; leave it null"
            )
        known = list(signature(BitsAndBytesConfig).parameters)[:-1]  # the last takes anything
        for name in self.quantization or ():
            if name not in known:
                raise UserError(f"quantization has no {name!r}; there are {', '.join(known)}")


@dataclass(eq=False)
class LoadedModel:
    """A model in memory, with its tokenizer and its origin.

    Attributes:
        model: the weights; None for a model behind an API.
        tokenizer: None where prompts are token ids alone.
        spec: where it came from; None for a model that the caller loaded.
        member: the member of a model behind an API; else None.
        adapted: the PEFT model that wraps `model` for an expert. Its adapter acts inside `model`,
            too, so a user of `model` alone must switch it off.
    """

    model: PreTrainedModel | None
    tokenizer: Any | None
    spec: ModelSpec | None = None
    member: Member | None = None
    adapted: Any | None = None

    @property
    def format(self) -> PromptFormat:
        """How prompts are rendered for it."""
        return self.spec.format if self.spec else PromptFormat()

    @property
    def output_size(self) -> int | None:
        """How many entries its logits have; None where that is unknown."""
        return self.model.config.get_text_config().vocab_size if self.model is not None else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a completion, by the configurations, the tokenizer, the server."""
        configs = [] if self.model is None else [self.model.generation_config, self.model.config]
        found = [getattr(config, "eos_token_id", None) for config in configs]
        found.append(getattr(self.tokenizer, "eos_token_id", None))
        lists = [each if isinstance(each, list | tuple) else [each] for each in found]
        own = self.member.eos_ids if self.member else frozenset[int]()
        return own | {int(i) for each in lists for i in each if i is not None}

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UserError: the model came without one.
        """
        if self.tokenizer is None:
            raise UserError(
                "this needs a tokenizer: give load(..., tokenizer=...), or token ids as prompts"
            )
        return self.tokenizer
