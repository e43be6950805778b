"""The settings of a training: the schema of conf/train.yaml."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from proxytune.config import overrides
from proxytune.config.schema import TrackingConfig
from proxytune.errors import UserError

# Settings that may differ when an interrupted training is continued.
VOLATILE = {
    "tracking",
    "threads",
    "output_dir",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "progress",
    "per_device_batch_size",
    "gradient_checkpointing",
}


@dataclass
class LoraSettings:
    """The adapter's shape; the defaults are the paper's (appendix D).

    Attributes:
        rank, alpha, dropout: as in peft.
        target_modules: "all-linear", or the names of the layers to adapt.
        merge: adds the adapter to the weights at the end and saves a whole model.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    target_modules: Any = "all-linear"
    merge: bool = False


@dataclass
class TrainConfig:
    """One training; conf/train.yaml is composed into it. The defaults are the paper's.

    Attributes:
        model: hub id or folder of the model to tune.
        revision: branch, tag or commit on the hub.
        data: "gsm8k", "triviaqa", or a JSONL file of {"prompt", "completion"} or {"messages"}.
        data_file: a local JSONL copy of gsm8k or triviaqa.
        output_dir: gets weights, tokenizer and train.json; a killed training is resumed from it.
        method: "full" or "lora".
        lora: the adapter's settings.
        epochs: passes over the data; ignored when `steps` is given.
        steps: optimiser steps; null follows `epochs`.
        batch_size: examples per optimiser step, over all devices.
        per_device_batch_size: examples per forward pass; gradients are accumulated over the rest.
        learning_rate: its peak, reached at the end of the warm-up.
        schedule: a name of transformers' schedulers.
        warmup: share of the steps in which the learning rate rises linearly.
        weight_decay: of AdamW.
        adam_betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        max_length: of prompt and answer together, in tokens.
        too_long: "error" or "drop"; see `data.tokenize`.
        order: "random", "sequential", or "group_by_length" (less padding).
        precision: "auto" is bfloat16 on a GPU that supports it, float32 elsewhere.
        gradient_checkpointing: takes less memory and about a third more time.
        attn_implementation: null leaves it to transformers.
        seed: of the order of examples, dropout and the adapter's initial weights.
        save_every: steps between checkpoints; null makes none.
        keep_checkpoints: how many are kept during training; a finished training keeps none.
        log_every: steps between points of the loss curve; null logs at the end only.
        progress: whether to show a progress bar.
        threads: CPU threads; null leaves it to torch.
        tracking: where the loss curve is sent.
    """

    model: str = MISSING
    revision: str | None = None
    data: str = MISSING
    data_file: str | None = None
    output_dir: str = MISSING
    method: str = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = 2
    steps: int | None = None
    batch_size: int = 128
    per_device_batch_size: int = 4
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup: float = 0.04
    weight_decay: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    max_length: int = 2048
    too_long: str = "error"
    order: str = "random"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    seed: int = 0
    save_every: int | None = 100
    keep_checkpoints: int = 1
    log_every: int | None = 10
    progress: bool = True
    threads: int | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def register() -> None:
    """Makes the schema known to Hydra under the name that conf/train.yaml begins with."""
    overrides.install()
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def check_choices(config: TrainConfig) -> None:
    """Refuses values that a setting does not have.

    Raises:
        UserError: the setting, its value, and the values that it may have.
    """
    choices = {
        "method": ("full", "lora"),
        "too_long": ("error", "drop"),
        "order": ("random", "sequential", "group_by_length"),
        "precision": ("auto", "float32", "bfloat16"),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise UserError(f"{name}={value} is not one of {', '.join(allowed)}")
    counts = ("steps", "batch_size", "per_device_batch_size", "max_length", "threads")
    counts += ("save_every", "keep_checkpoints", "log_every", "lora.rank")
    for name in (*counts, "epochs", "learning_rate", "weight_decay", "max_grad_norm"):
        value = attrgetter(name)(config)
        least = 1 if name in counts else 0
        if value is not None and not (least <= value < math.inf):
            raise UserError(f"{name}={value}: it must be a finite number, {least} or more")
    if config.epochs == 0:
        raise UserError("epochs=0 trains nothing; give a positive number, or steps=...")
    if len(config.adam_betas) != 2:
        raise UserError(f"adam_betas must be two numbers, not {config.adam_betas}")
    if not 0 <= config.warmup < 1:
        raise UserError(f"warmup is a share of the steps, from 0 to below 1, not {config.warmup}")
