"""The processes ("ranks") that torchrun starts, by their environment; imports nothing large."""

import os

RANKS = "ranks"  # the device of a model of which each rank holds a part


def launched() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) where torchrun started none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
