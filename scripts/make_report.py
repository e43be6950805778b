"""Writes the HTML pages of finished runs again, from the files of their results folders.

python scripts/make_report.py                          every run in results/runs
python scripts/make_report.py results/runs/pocket      one of them; with its sweep's, if it has one
python scripts/make_report.py A B C --output runs.html one page over several runs
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.files import ROOT


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="*",
        type=Path,
        help="results folders, or a sweep's; several make one page that compares them",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PAGE",
        help="where the page over several runs is written; default: runs.html beside them",
    )
    given = parser.parse_args(arguments)
    for page in write_pages(given.folder, given.output):
        print(page)


def write_pages(folders: Sequence[Path], output: Path | None) -> Iterator[Path]:
    """Writes the pages that the command line asks for.

    Raises:
        UserError: a folder holds no finished run.
    """
    from proxytune.results.runs import points_of
    from proxytune.results.runs_page import NAME, write_runs

    if missing := [each for each in folders if not each.is_dir()]:
        raise UserError(f"{missing[0]} is not a folder; a run has one, results/runs/NAME")
    if len(folders) > 1:
        # a sweep's folder without a run of its own stands for its points
        runs = [
            run
            for each in folders
            for run in (points_of(each) if not (each / "run.json").is_file() else []) or [each]
        ]
        common = Path(os.path.commonpath([run.resolve().parent for run in runs]))
        yield write_runs(runs, output or common / NAME)
        return
    if output is not None:
        raise UserError("--output is for a page over several runs; give at least two folders")
    every = sorted(path for path in (ROOT / "results/runs").glob("*") if path.is_dir())
    found = [page for each in folders or every for page in _of_folder(each, bool(folders))]
    if not found:
        raise UserError("results/runs holds no finished run; `python run.py` makes one")
    yield from found


def _of_folder(folder: Path, named: bool) -> Iterator[Path]:
    """A run's page, and the page over the points of its sweep.

    Args:
        folder: one results folder.
        named: whether the command line names it, so that it has to hold a run.
    """
    from proxytune.results.report import write_report
    from proxytune.results.runs import is_scored, points_of
    from proxytune.results.runs_page import write_sweep

    points = points_of(folder)
    whole = is_scored(folder)
    if whole or (named and not points):
        yield write_report(folder)
    if len(points) + whole > 1:
        yield write_sweep(folder)
    elif points and named:
        yield write_report(points[0])


if __name__ == "__main__":
    guarded(main, again="")
