"""Makes the paper's tables from committed metrics; takes seconds and no model.

    python scripts/make_tables.py                      every table
    python scripts/make_tables.py --table 2            one of them; --help lists their numbers
    python scripts/make_tables.py --table 2 --pocket   the pocket family's

First it copies the comparison tables of finished runs (results/runs) to results/metrics; then it
writes results/tables/table<N>.md and .csv. `--rescored FILE` shows the authors' published runs in
the place of our numbers; `scripts/rescore.py --json FILE` scores them and writes that file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from proxytune.cli.guard import guarded
from proxytune.files import ROOT, read_json
from proxytune.results import paper_tables
from proxytune.results.paper_tables import NUMBERS


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="append", choices=NUMBERS, help="default: every table")
    parser.add_argument("--pocket", action="store_true", help="of the pocket family")
    parser.add_argument("--rescored", type=Path, help="JSON of scripts/rescore.py, for ours")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="default: results/")
    options = parser.parse_args(arguments)
    results: Path = options.results
    if options.rescored:
        ours = paper_tables.from_rescored(read_json(options.rescored))
    else:
        paper_tables.collect(results / "runs", results / "metrics")
        ours = paper_tables.read_ours(results / "metrics")
    for number in options.table or NUMBERS:
        path = paper_tables.write(number, results, ours, pocket=options.pocket)
        if path is None:
            print(f"table {number}: nothing has been measured for it yet")
        else:
            Console().print(Markdown(path.read_text()))
            print(f"{path}\n")


if __name__ == "__main__":
    guarded(main, again="")
