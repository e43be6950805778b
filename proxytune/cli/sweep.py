"""The points of a sweep (`-m`): where each writes, which would write to one folder, their page."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from proxytune.errors import UserError
from proxytune.files import check_output_dir, folder_name

log = logging.getLogger(__name__)


def point_folder(output_dir: str, point: str) -> Path:
    """The results folder of one point of a sweep.

    Args:
        output_dir: the folder of the sweep.
        point: the settings that change completions (Hydra's `override_dirname`); "" where the
            point has none, and is its sweep's only one.

    Raises:
        UserError: `output_dir` says of no place where it is.
    """
    check_output_dir(output_dir)
    return Path(output_dir, folder_name(point)) if point else Path(output_dir)


def check_points(points: Iterable[tuple[Sequence[str], Path]]) -> None:
    """Refuses a sweep of which two points would write to one folder, before the first starts.

    Args:
        points: each point's settings as the command line would give them, and its folder.

    Raises:
        UserError: the message names the settings in which the two differ.
    """
    seen: dict[Path, tuple[int, Sequence[str]]] = {}
    for number, (settings, written) in enumerate(points, start=1):
        folder = written.resolve()
        first, others = seen.setdefault(folder, (number, settings))
        if first == number:
            continue
        differing = [pair for pair in zip(others, settings, strict=True) if pair[0] != pair[1]]
        if not differing:
            raise UserError(f"points {first} and {number} of the sweep are the same: {folder}")
        values = ", ".join(f"{one} and {other}" for one, other in differing)
        raise UserError(
            f"points {first} and {number} of the sweep differ in {values} alone, which changes no "
            f"completion: both would write to {folder}; run them one by one, or give each value a "
            "folder of its own (output_dir=...)"
        )


def report_sweep(folder: Path) -> None:
    """Writes the page over a sweep's points; a damaged file costs the page alone."""
    from proxytune.results.runs import points_of
    from proxytune.results.runs_page import write_sweep

    if len(points_of(folder)) < 2:
        return
    try:
        print(f"\nreport of the sweep: {write_sweep(folder)}")
    except UserError as error:
        log.warning("no report of the sweep was written: %s", error)
