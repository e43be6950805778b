"""Facts about a loaded model: its longest row, its device, the tolerance of its logits."""

from collections import Counter

import torch
import transformers
from torch.nn import ModuleList
from transformers import PreTrainedConfig, PreTrainedModel

TRIED = "5.23.0"  # the transformers that the lists of docs/models.md were made with


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest row in tokens that a model reads; None where its configuration names no limit.

    Some rotary embeddings (dynamic NTK, longrope) change for the whole batch once one row exceeds
    a length. That length is then the limit: beyond it, a row would depend on its neighbours.
    """
    return positions_of(model.config)


def positions_of(config: PreTrainedConfig) -> int | None:
    """`max_positions` by a model's configuration."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        first = rope.get("original_max_position_embeddings")
        return first or getattr(config, "original_max_position_embeddings", None) or limit
    return limit


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model takes its token ids."""
    return next(model.get_input_embeddings().parameters()).device


def layer_devices(model: PreTrainedModel) -> dict[torch.device, int]:
    """How many of a model's layers run on each device, and keep their caches there.

    A layer whose weights wait on the CPU or on disk runs where the model takes its token ids.
    """
    first = input_device(model)
    count = model.config.get_text_config().num_hidden_layers
    placed: dict[str, int | str | torch.device] = getattr(model, "hf_device_map", None) or {}
    lists = [n for n, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == count]
    if not lists:
        return {first: count}
    found = Counter[torch.device]()
    for index in range(count):
        name = f"{lists[0]}.{index}"
        whole = [part for part in placed if part == "" or f"{name}.".startswith(f"{part}.")]
        where = placed[max(whole, key=len)] if whole else "cpu"
        device = torch.device("cuda", where) if isinstance(where, int) else where
        found[first if device in ("cpu", "disk") else torch.device(device)] += 1
    return dict(found)


def tolerance(dtype: torch.dtype) -> float:
    """How far the logits of two ways to compute one pass may differ, relative to the largest."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def version_hint() -> str:
    """The end of a message about a model's own code: another version's may be able to do it."""
    installed = transformers.__version__
    if installed == TRIED:
        return ""
    return f"; this is transformers {installed}, with {TRIED} it may be otherwise"


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The greatest difference of two tensors; equal infinities have none."""
    return float((got - want).abs().masked_fill_(got == want, 0).max())


def magnitude(logits: torch.Tensor) -> float:
    """The greatest finite absolute value."""
    return float(logits[logits.isfinite()].abs().max())
