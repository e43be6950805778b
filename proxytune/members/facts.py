"""What every member asks of its model."""

import torch
from transformers import PreTrainedModel


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest row that a model reads; None for no limit that it names.

    Where the rotary embedding of all rows changes once one row passes a length (dynamic NTK,
    longrope), that length is the limit: beyond it a row would depend on its neighbours.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        first = rope.get("original_max_position_embeddings")
        return first or getattr(config, "original_max_position_embeddings", None) or limit
    return limit


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids."""
    return next(model.get_input_embeddings().parameters()).device


def tolerance(dtype: torch.dtype) -> float:
    """How far logits of one pass, computed in two ways, may lie apart, by the largest of them."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
