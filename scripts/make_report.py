"""Writes the HTML page of finished runs again, from the files of their results folders.

python scripts/make_report.py                      every run in results/runs
python scripts/make_report.py results/runs/pocket  one of them
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.files import ROOT


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="*", type=Path, help="results folders; default: all")
    folders: list[Path] = parser.parse_args(arguments).folder
    from proxytune.results.report import write_report

    folders = folders or [p.parent for p in sorted((ROOT / "results/runs").glob("*/table.csv"))]
    if not folders:
        raise UserError("results/runs holds no finished run; `python run.py` makes one")
    for folder in folders:
        print(write_report(folder))


if __name__ == "__main__":
    guarded(main, again="")
