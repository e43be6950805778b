"""A model in memory, with everything that belongs to it."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from proxytune.engine.system import Member
from proxytune.errors import UserError
from proxytune.loading.ends import end_ids
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec


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
        own = self.member.eos_ids if self.member else frozenset[int]()
        return own | end_ids(self.tokenizer, *configs)

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
