"""How many rows may decode at once, from the memory that is free."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch

from proxytune.engine.system import Member

GPU_ROWS = 256
CPU_ROWS = 32  # a CPU gains nothing from more: its matrix products are no longer bound by memory
GPU_SHARE = 0.8  # of the free memory
CPU_SHARE = 0.5
LOGITS_COPIES = 6  # float32 copies of a row's logits that the choice of a token may take


def row_budget(
    members: Iterable[Member], batch_size: int | Literal["auto"] = "auto"
) -> Callable[[int], int]:
    """A function that says how many rows of a given length fit: `budget(tokens) -> rows`.

    Its result is at least 1.

    Args:
        members: the system's members; one that is spread over several devices takes of each what
            its own layers there need.
        batch_size: the number of rows that the user asks for; "auto" depends on the free memory.
    """
    if batch_size != "auto":
        limit = batch_size
        return lambda tokens: limit
    per_token: Counter[torch.device] = Counter()
    per_row: Counter[torch.device] = Counter()
    limits = []
    for member in members:
        per_token.update({member.device: 0, **member.bytes_per_token()})
        per_row[member.device] += LOGITS_COPIES * 4 * member.vocab_size
        if member.max_rows is not None:
            limits.append(member.max_rows)
    free = {device: _free_bytes(device) for device in per_token}
    most = GPU_ROWS if any(device.type == "cuda" for device in free) else CPU_ROWS
    most = min([most, *limits])

    def budget(tokens: int) -> int:
        fits = [
            int(free[device] / (per_token[device] * tokens + per_row[device])) for device in free
        ]
        return max(1, min([most, *fits]))

    return budget


def _free_bytes(device: torch.device) -> float:
    """The share of a device's free memory that rows may take, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return GPU_SHARE * (free + kept)
    return CPU_SHARE * _available_bytes()


def _available_bytes() -> float:
    """The main memory that new allocations can get, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: count all memory as free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (available,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out, on a GPU or on the CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
