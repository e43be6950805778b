"""An expert that is an adapter (LoRA) of the antiexpert: one copy of the weights, one pass."""

from collections.abc import Sequence
from typing import Any

import torch

from proxytune.members.halves import HalvedModel

PLAIN = "__base__"  # PEFT's name for the model without its adapter


class AdapterModel(HalvedModel):
    """A PEFT model that uses its adapter for some rows and not for others.

    Args:
        model: a `peft.PeftModel` with one adapter.
        vocab_size: the logits are cut to this many entries.
        paired: True uses the adapter for even rows (the expert's) and not for odd ones; False
            uses it for none.
    """

    def __init__(self, model: Any, vocab_size: int, paired: bool = True) -> None:
        super().__init__(model, vocab_size)
        self._adapted = model
        self._adapter: str = model.active_adapter
        self._paired = paired

    def _call(self, rows: Sequence[int], **inputs: Any) -> torch.Tensor:
        names = [self._adapter if self._paired and row % 2 == 0 else PLAIN for row in rows]
        if len(set(names)) > 1:
            return self._adapted(adapter_names=names, **inputs).logits
        if names[0] == PLAIN:
            with self._adapted.disable_adapter():
                return self._adapted(**inputs).logits
        return self._adapted(**inputs).logits
