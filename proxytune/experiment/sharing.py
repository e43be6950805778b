"""The points of a sweep read each other's finished work.

A sweep's folder holds one results folder for each of its points. Points that differ in alpha or in
the formula have the same base, expert and tuned systems: the first point generates their
completions, and the others copy them. A copy, not a link: every point's folder can be moved,
scored, resumed and shown without the others.

The folder of the sweep is read, too: `python run.py` writes there what the points share.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from proxytune.errors import UserError
from proxytune.experiment.completions import lacks, read_completions
from proxytune.experiment.identity import is_made_alike
from proxytune.files import JsonlWriter
from proxytune.records import Example

log = logging.getLogger(__name__)

_OWN = ("cell.json", "scores.jsonl", "judges.json")  # what each point writes for itself


def alike(sweep: Path, folder: Path, identity: dict[str, object]) -> Iterator[tuple[str, Path]]:
    """The cells of other points whose completions are this cell's, too: (point, folder).

    Args:
        sweep: the folder of the sweep's points.
        folder: of one system on one task, in the results folder of one point.
        identity: everything that its completions depend on.
    """
    point = folder.parents[1]
    place = folder.relative_to(point)
    others = sorted(each for each in sweep.iterdir() if each.is_dir() and each != point)
    for other in (sweep, *others):
        if is_made_alike(other / place, identity):
            yield (other.name, other / place)


def copy_completions(source: Path, target: Path, examples: Sequence[Example], samples: int) -> int:
    """Appends the completions that `target` lacks and `source` has.

    Args:
        source: another cell's completions.jsonl; its run may still append to it.
        target: this cell's.
        examples: those that are asked.
        samples: completions per example.

    Returns:
        How many were copied.
    """
    try:
        theirs = read_completions(source)
    except UserError as error:
        log.warning("%s; nothing is copied from it", error)
        return 0
    stored = read_completions(target)
    copied = 0
    with JsonlWriter(target) as writer:
        for example in (each for each in examples if lacks(stored, each, samples)):
            own = stored.get(example.id, {})
            for sample, completion in sorted(theirs.get(example.id, {}).items()):
                if sample < samples and sample not in own:
                    writer.write(completion)
                    copied += 1
    return copied


def copy_finished(source: Path, target: Path) -> None:
    """Copies the finished result of a task that runs itself, and its examples.

    The files are copied in the order in which they were written: the last one marks the result as
    finished.
    """
    files = [each for each in source.iterdir() if each.is_file() and each.name not in _OWN]
    for each in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        shutil.copyfile(each, target / each.name)
    examples = source.parent / "examples.jsonl"
    if examples.is_file():
        shutil.copyfile(examples, target.parent / examples.name)
