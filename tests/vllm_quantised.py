"""A triple whose base is stored in 8 bits: the sum of what vLLM gives for each member alone.

    python -m tests.vllm_quantised FOLDER

Quantised products differ between libraries, so the reference is vLLM's own model of the same
checkpoint, not our engine. Prints the largest difference of a log-probability, and beside it how
far the quantised base is from the base in float32.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import proxytune
from proxytune.vllm.settings import EngineSettings
from tests.vllm_cases import family, one_prompt_each, specs

VOCABULARY = 300  # entries of the tokenizer of vllm_cases.family


def quantise(source: Path, folder: Path) -> None:
    """Copies a checkpoint with its linear layers in 8 bits, as compressed-tensors stores them."""
    shutil.copytree(source, folder)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight
        if "proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
            weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    part = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": part | {"strategy": "channel", "dynamic": False},
        "input_activations": part | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def logprobs(members: dict[str, proxytune.ModelSpec], prompts: Any) -> torch.Tensor:
    """The log-probabilities of the next token at every position of the prompts, by vLLM."""
    from proxytune.vllm.pool import load_engine

    given = EngineSettings(name="vllm", options={"max_num_seqs": 16})
    generator = load_engine(members, given)
    count = len(prompts)
    rated = generator.rate(prompts, [None] * count, [VOCABULARY] * count)
    generator.engine.close()
    found = []
    for token in [token for row in rated for token in row if token]:
        listed = dict(token.top)
        found.append([listed[i] for i in range(VOCABULARY)])
    return torch.tensor(found)


def main(folder: str) -> None:
    place = Path(folder)
    family(place)
    quantise(place / "base", place / "int8")
    prompts = one_prompt_each(4)
    triple, whole = specs(place, base="int8"), specs(place)
    alone = {role: logprobs({"base": spec}, prompts) for role, spec in triple.items()}
    wanted = (alone["base"] + alone["expert"] - alone["antiexpert"]).log_softmax(-1)
    found = {
        "rows": len(wanted),
        "triple": float((logprobs(triple, prompts) - wanted).abs().max()),
        "quantised": float(
            (logprobs({"base": whole["base"]}, prompts) - alone["base"]).abs().max()
        ),
    }
    print("RESULTS", json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(*sys.argv[1:])
