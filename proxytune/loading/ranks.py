"""Tensor parallelism: the processes ("ranks") that torchrun starts, with a part of each model.

All of them run the same passes over the same rows. Rank 0 decides what the clock or the memory of a
process could decide otherwise, and the others hear of it.
"""

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from proxytune.errors import UserError
from proxytune.loading.launched import launched

# Others wait in a collective while rank 0 reads files or asks a judge's key.
_PATIENCE = timedelta(days=2)


def join() -> None:
    """Meets the other ranks; a second call does nothing."""
    if distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"  # numbers travel by the first, layers by the second
    distributed.init_process_group(backend, timeout=_PATIENCE)


def told(value: Any = None) -> Any:
    """Rank 0's value, in every rank; any object that can be pickled."""
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def told_number(value: int) -> int:
    """Rank 0's number, in every rank."""
    number = torch.tensor([value])
    distributed.broadcast(number, src=0)
    return int(number)


def least(value: int) -> int:
    """The smallest of all ranks' numbers, in every rank."""
    number = torch.tensor([value])
    distributed.all_reduce(number, distributed.ReduceOp.MIN)
    return int(number)


def told_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Rank 0's token ids, in every rank."""
    tokens = tokens.contiguous()
    distributed.broadcast(tokens, src=0)
    return tokens


def check_parts(role: str, config: Any) -> None:
    """Refuses a model that cannot be divided among the ranks.

    Args:
        role: names the model in the message.
        config: its configuration.

    Raises:
        UserError: transformers is too old, has no plan for the model, or its heads do not divide.
    """
    config = config.get_text_config()
    _, world = launched()
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise UserError(
            f"{role}: transformers has no tensor-parallel plan for {config.model_type}; use "
            "replicas, a serving engine, or machine=sharded (docs/scale.md)"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % world:
        raise UserError(
            f"{role}: its {heads} key-value heads cannot be divided among {world} processes; "
            "machine.tensor_parallel takes a divisor of them"
        )
    distributed_config()


def distributed_config() -> Any:
    """The argument of `from_pretrained` that gives each rank its part.

    Raises:
        UserError: transformers is too old.
    """
    from transformers import __version__

    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return DistributedConfig(tp_size=launched()[1])
    except (ImportError, TypeError) as error:
        raise UserError(
            f"machine.tensor_parallel needs a newer transformers than {__version__}: "
            "pip install -U transformers"
        ) from error
