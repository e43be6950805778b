"""The files of an adapter: its tensors, and their names and shapes without reading them."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from proxytune.errors import UserError
from proxytune.loading.spec import ModelSpec


def shapes_of(role: str, spec: ModelSpec) -> dict[str, list[int]]:
    """The names and shapes of an adapter's tensors, from the header of its file."""
    path = _weights(role, spec)
    if path.suffix == ".safetensors":
        with _opened(role, spec, path) as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: list(tensor.shape) for name, tensor in _pickled(role, spec, path, "meta").items()}


def tensors_of(role: str, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """An adapter's tensors with their names, one after the other."""
    path = _weights(role, spec)
    if path.suffix == ".safetensors":
        with _opened(role, spec, path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)
    else:
        yield from _pickled(role, spec, path, "cpu").items()


def _weights(role: str, spec: ModelSpec) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        path = file_of(spec, name)
        if path is not None:
            return path
    raise UserError(
        f"{role}: {spec.adapter} holds no adapter_model.safetensors (or .bin); give the folder "
        "that PEFT's save_pretrained wrote"
    )


def _opened(role: str, spec: ModelSpec, path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{role}: {spec.adapter}: {path.name} cannot be read ({error})") from error


def _pickled(role: str, spec: ModelSpec, path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{role}: {spec.adapter}: {path.name} cannot be read ({reason})") from error
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(
            f"{role}: {spec.adapter}: {path.name} holds more than tensors by their names; give the "
            "folder that PEFT's save_pretrained wrote"
        )
    return found


def file_of(spec: ModelSpec, name: str, local_files_only: bool = False) -> Path | None:
    """A file of the adapter's folder or repository; None where there is none."""
    assert spec.adapter is not None
    found = cached_file(
        spec.adapter,
        name,
        revision=spec.adapter_revision,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
