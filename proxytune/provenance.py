"""Facts that identify a run: versions, hardware, and hashes of models and datasets.

They go into run.json and into the identity of each (system, task).
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer

from proxytune.files import IN_CHECKOUT, ROOT
from proxytune.hashes import sha256_json, sha256_text
from proxytune.loading.adapters import adapter_tokenizer
from proxytune.loading.prompting import read_template
from proxytune.loading.spec import ModelSpec
from proxytune.records import Example
from proxytune.secrets import redacted

_PACKAGES = [
    "proxytune",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "lm_eval",
    "peft",
    "accelerate",
    "numpy",
    "hydra-core",
]
_HEAD_BYTES = 1 << 16


def dataset_sha256(examples: Iterable[Example]) -> str:
    """A hash of all examples (ids, prompts, targets, rows), in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(sha256_json(asdict(example)).encode())
    return digest.hexdigest()


def weights_fingerprint(model_id: str) -> str | None:
    """A cheap fingerprint of a local model folder; None for a hub id.

    It hashes the size and both ends of every file: enough to notice that weights were trained
    again under the same name, without reading 140 GB.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
            file.seek(max(0, size - _HEAD_BYTES))
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()


def model_facts(member: Mapping[str, Any]) -> dict[str, str]:
    """Resolves the names in a member's configuration to what this machine has under them.

    Args:
        member: the fields of a `ModelSpec`.

    Returns:
        Those of `hashes.FACTS` that this machine knows: fingerprints of local folders, the commits
        of hub repositories in the cache, and the hash of the member's chat template.
    """
    facts = {
        "weights": weights_fingerprint(member["id"]),
        "commit": _hub_commit(member["id"], member["revision"], "config.json"),
    }
    if member["adapter"]:
        name, revision = member["adapter"], member["adapter_revision"]
        facts["adapter_weights"] = weights_fingerprint(name)
        facts["adapter_commit"] = _hub_commit(name, revision, "adapter_config.json")
    if member["format"]["kind"] == "chat":
        template = member["format"]["chat_template"]
        facts["chat_template_sha256"] = (
            sha256_text(read_template(template))
            if template
            else _own_template_sha256(
                member["id"],
                member["revision"],
                member["adapter"],
                member["adapter_revision"],
                bool(member["trust_remote_code"]),
            )
        )
    return {name: fact for name, fact in facts.items() if fact is not None}


def _hub_commit(name: str, revision: str | None, file: str) -> str | None:
    """The cached commit of a hub repository; None for a folder, or if it is not in the cache."""
    if Path(name).is_dir():
        return None
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # the path of a folder on another machine
        return None
    return Path(found).parent.name if isinstance(found, str) else None


@cache
def _own_template_sha256(
    name: str,
    revision: str | None,
    adapter: str | None,
    adapter_revision: str | None,
    trust_remote_code: bool,
) -> str | None:
    """The hash of the template in a model's repository, or in that of its adapter."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None  # the model is not on this machine
    if adapter is not None:
        spec = ModelSpec(
            name,
            adapter=adapter,
            adapter_revision=adapter_revision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = adapter_tokenizer(spec, tokenizer, local_files_only=True)
    template = tokenizer.chat_template
    return sha256_text(template) if isinstance(template, str) else None


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout; both None outside of a git checkout."""

    def git(*arguments: str) -> str | None:
        if not IN_CHECKOUT:
            return None
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, threads and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def environment() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process."""
    return {
        "command": redacted([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested mappings differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found
