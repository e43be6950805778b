"""Where a model comes from and how it is loaded: one node of conf/triple, and of the Python API."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxytune.errors import UserError
from proxytune.loading.prompting import PromptFormat
from proxytune.members.api.settings import MISSING, ApiSettings, settings_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass  # not frozen: Hydra builds its schema from it
class ModelSpec:
    """Where one model comes from and how it is loaded.

    Attributes:
        id: a hub id or a local folder. No model is ever assumed.
        revision: a branch, tag or commit of the hub repository.
        dtype: "auto" is the checkpoint's own; else float32, bfloat16 or float16.
        device: "cpu", "cuda:1", ...; "auto" spreads over all GPUs; None is the first GPU or,
            without one, the CPU (in a configuration, what the machine group says).
        quantization: arguments of transformers' BitsAndBytesConfig ({"load_in_4bit": True}); none
            quantises nothing.
        adapter: the id or folder of a PEFT adapter for the model. An expert that adapts the
            antiexpert's own checkpoint shares its weights.
        adapter_revision: as `revision`, for the adapter.
        attn_implementation: "sdpa" or "eager"; None leaves it to transformers.
        trust_remote_code: lets the checkpoint bring its own modelling code.
        format: how prompts are rendered for it.
        max_memory: device -> the most that a spread model takes of it; see `MachineConfig`.
        api: the OpenAI-compatible endpoint that serves the model (`ApiSettings`, or a mapping of
            its fields); `id` then names its tokenizer.
    """

    id: str = MISSING
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization: dict[str, Any] | None = field(default_factory=dict)
    adapter: str | None = None
    adapter_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    format: PromptFormat = field(default_factory=PromptFormat)
    max_memory: dict[Any, Any] | None = None
    api: ApiSettings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise UserError(f"a model is named by a folder or a hub id, not {self.id!r}")
        if isinstance(self.api, Mapping):
            self.api = settings_of(self.api)
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.attn_implementation not in (None, "sdpa", "eager"):
            raise UserError(
                f"attn_implementation={self.attn_implementation!r}: rows of different lengths "
                "need explicit masks, which sdpa and eager take; leave it null"
            )
