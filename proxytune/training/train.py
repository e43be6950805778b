"""Supervised fine-tuning of one model, full or LoRA, through transformers' Trainer.

The Trainer owns the loop, the optimiser, mixed precision, gradient accumulation, checkpoints and
several GPUs. This module chooses model and data, refuses mistakes before a model is loaded, and
records in train.json how the weights were made.
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from proxytune import provenance
from proxytune.errors import UserError
from proxytune.files import read_json, write_json
from proxytune.hashes import sha256_json
from proxytune.training.config import VOLATILE, TrainConfig, check_choices
from proxytune.training.data import Tokenized, check_source, collate, read_rows, tokenize

RECORD = "train.json"
_SECONDS = "seconds.json"  # beside a checkpoint's weights: the training time up to it


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a training, continues it after an interruption, or finds it finished.

    Returns:
        The content of train.json: configuration, data, steps, tokens, seconds, loss, environment.

    Raises:
        UserError: a setting, the model's path, the data or the output folder is wrong; no
            weights have been loaded then.
    """
    from transformers import Trainer  # not above: with WANDB_MODE=offline it speaks to any importer

    accumulation = _accumulation(config)
    tokenizer = check(config)
    output = Path(config.output_dir)
    data = tokenize(
        read_rows(config.data, config.data_file), tokenizer, config.max_length, config.too_long
    )
    identity = _identity(config, data)
    finished = _claim(output, identity)
    if finished is not None:
        print(f"{output} holds this training already, finished; nothing to do")
        return finished
    checkpoint = _last_checkpoint(output)
    if config.threads:
        torch.set_num_threads(config.threads)

    if not config.progress:
        transformers.utils.logging.disable_progress_bar()
    clock = _Clock(checkpoint)
    trainer = Trainer(
        model=_load_model(config),
        args=_arguments(config, accumulation),
        train_dataset=data.examples,  # pyright: ignore[reportArgumentType] (a list is a map-style set)
        data_collator=collate,  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = clock.elapsed()
    _save(trainer, config, output)

    record = identity | _finished(trainer, config, accumulation, seconds)
    if trainer.is_world_process_zero():
        write_json(output / RECORD, record)
        (output / "training_args.bin").unlink(missing_ok=True)  # train.json has it, too
        for folder in output.glob("checkpoint-*"):
            shutil.rmtree(folder)
    return record


def _finished(
    trainer: Any, config: TrainConfig, accumulation: int, seconds: float
) -> dict[str, Any]:
    """The part of train.json that is known only when the training is finished."""
    state = trainer.state
    parameters = [p.numel() for p in trainer.model.parameters() if p.requires_grad]  # pyright: ignore
    return {
        "status": "finished",
        "steps": state.global_step,
        "epochs": state.epoch,
        "tokens": state.num_input_tokens_seen,
        "seconds": seconds,
        "loss_curve": [[e["step"], e["loss"]] for e in state.log_history if "loss" in e],
        "trained_parameters": sum(parameters),
        "per_device_batch_size": config.per_device_batch_size,
        "gradient_accumulation": accumulation,
        "devices": _world_size(),
        "precision": "bfloat16" if _bf16(config) else "float32",
        "environment": provenance.environment(),
    }


def check(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Refuses mistakes that show without the weights; returns the model's tokenizer.

    Raises:
        UserError: a bad setting, or a model or data file that does not exist.
    """
    check_choices(config)
    check_source(config.data, config.data_file)
    return _load_tokenizer(config)


class _Clock(TrainerCallback):
    """Counts training time across interruptions: each checkpoint stores the time up to it."""

    def __init__(self, checkpoint: Path | None) -> None:
        self._before = 0.0
        if checkpoint and (checkpoint / _SECONDS).exists():
            self._before = float(read_json(checkpoint / _SECONDS))
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training, including those before an interruption."""
        return self._before + time.perf_counter() - self._start

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (folder / _SECONDS).write_text(json.dumps(self.elapsed()))


def _arguments(config: TrainConfig, accumulation: int) -> TrainingArguments:
    reports = []
    if config.tracking.kind == "wandb":
        reports = ["wandb"]
        os.environ["WANDB_PROJECT"] = config.tracking.project
        os.environ["WANDB_MODE"] = config.tracking.mode
        if config.tracking.entity:
            os.environ["WANDB_ENTITY"] = config.tracking.entity
    return TrainingArguments(
        output_dir=config.output_dir,
        run_name=Path(config.output_dir).name,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,  # transformers takes a number below 1 for a share of all steps
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy=config.order,
        bf16=_bf16(config),
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        logging_strategy="steps" if config.log_every else "no",
        logging_steps=config.log_every or 500,
        disable_tqdm=not config.progress,
        report_to=reports or "none",
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )


def _load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    folder = Path(config.model)
    looks_local = config.model.startswith((".", "/", "~")) or config.model.count("/") != 1
    if looks_local and not folder.is_dir():
        raise UserError(f"no model at {config.model}: give a folder or a hub id (owner/name)")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{config.model} is not a model: it has no config.json")
    try:
        return AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {config.model}: {reason}") from error


def _load_model(config: TrainConfig) -> PreTrainedModel:
    """Loads the model in float32, which autocast turns into bfloat16 where that is asked for.

    Under LoRA with bfloat16, the frozen weights are loaded in bfloat16.
    """
    half = config.method == "lora" and _bf16(config)
    model = AutoModelForCausalLM.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation=config.attn_implementation,
    )
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    settings = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)  # pyright: ignore[reportReturnType]


def _save(trainer: Any, config: TrainConfig, output: Path) -> None:
    """Saves the tuned weights: in bfloat16 after bfloat16 training, else in float32."""
    model: Any = trainer.model
    model.config.use_cache = True
    if trainer.is_fsdp_enabled:  # from_pretrained cannot load sharded weights
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output))
    if not trainer.is_world_process_zero():
        return
    dtype = torch.bfloat16 if _bf16(config) else torch.float32
    if config.method == "lora" and config.lora.merge:
        from peft import PeftModel

        whole = AutoModelForCausalLM.from_pretrained(
            config.model, revision=config.revision, dtype=dtype
        )
        adapted: Any = PeftModel.from_pretrained(whole, str(output))
        adapted.merge_and_unload().save_pretrained(output)
        for path in output.glob("adapter_*"):
            path.unlink()
    elif config.method == "full" and dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(output, dtype=dtype).save_pretrained(output)


def _bf16(config: TrainConfig) -> bool:
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _accumulation(config: TrainConfig) -> int:
    """Forward passes per optimiser step, so that together they make up `batch_size`."""
    at_once = config.per_device_batch_size * _world_size()
    if at_once < 1 or config.batch_size % at_once:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of per_device_batch_size="
            f"{config.per_device_batch_size} x {_world_size()} device(s)"
        )
    if _world_size() == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start with `accelerate "
            "launch scripts/train_expert.py ...`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    return config.batch_size // at_once


def _identity(config: TrainConfig, data: Tokenized) -> dict[str, Any]:
    """Everything that the weights depend on: equal identities give the same weights."""
    settings = {k: v for k, v in asdict(config).items() if k not in VOLATILE}
    return {
        "config": settings,
        "model_fingerprint": provenance.weights_fingerprint(config.model),
        "data": {
            "examples": len(data.examples),
            "tokens": data.tokens,
            "answer_tokens": data.answer_tokens,
            "dropped_too_long": data.dropped,
            "tokenised_apart": data.resplit,
            "sha256": sha256_json(data.examples),
        },
    }


def _claim(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Takes `output` for this training; returns its record if the training is finished.

    Raises:
        UserError: the folder cannot be written, or holds something else.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make output_dir={output}: {error.strerror}") from error
    path = output / RECORD
    if path.exists():
        record = read_json(path, status=str)
        changed = provenance.differences(
            {k: record.get(k) for k in identity}, json.loads(json.dumps(identity))
        )
        if changed:
            raise UserError(
                f"{output} holds another training ({'; '.join(changed)}): choose another "
                "output_dir, or delete it"
            )
        return record if record["status"] == "finished" else None
    if os.environ.get("RANK", "0") != "0":
        return None  # the first process makes the folder
    if any(output.iterdir()):
        raise UserError(f"{output} holds files of something else: choose another output_dir")
    try:
        write_json(path, identity | {"status": "running"})
    except OSError as error:
        raise UserError(f"cannot write to output_dir={output}: {error.strerror}") from error
    return None


def _last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are deleted.

    The Trainer writes trainer_state.json last, so a checkpoint in which it is missing or broken
    was cut short.
    """
    whole = {}
    for folder in output.glob("checkpoint-*"):
        try:
            whole[read_json(folder / "trainer_state.json", global_step=int)["global_step"]] = folder
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    return whole[max(whole)] if whole else None
