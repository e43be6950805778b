"""Tunes a model on prompts and answers: an expert, or the directly tuned model to compare with.

    python scripts/train_expert.py model=meta-llama/Llama-2-7b-hf data=gsm8k \
        output_dir=models/llama2-7b-gsm
    python scripts/train_expert.py model=... data=triviaqa train=lora output_dir=...
    python scripts/train_expert.py model=./small data=dialogues.jsonl output_dir=./expert \
        batch_size=32 learning_rate=2e-3 epochs=3 threads=1
    accelerate launch --num_processes 8 scripts/train_expert.py model=... data=gsm8k ...

The same command goes on where a killed training stopped. docs/training.md has the details.
"""

import os

import hydra
from omegaconf import DictConfig, OmegaConf

from proxytune.cli.guard import guarded
from proxytune.files import ROOT
from proxytune.training.config import TrainConfig, register


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
def main(cfg: DictConfig) -> None:
    """Composes conf/train.yaml with the command line and trains."""
    from proxytune.training.train import train  # imports torch, which --help does not need

    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    train(config)


register()

if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints and exits before we can explain
    guarded(main)
