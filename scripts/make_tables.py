"""Builds the paper's tables from committed metrics; costs seconds and no model.

    python scripts/make_tables.py                      every table
    python scripts/make_tables.py --table 2            one of 2, 3, 4, 5, 6, 7, 12, 14, 15
    python scripts/make_tables.py --table 2 --pocket   the pocket family's

First it copies the comparison tables of finished runs (results/runs) to results/metrics; then it
writes results/tables/table<N>.md and .csv. `--rescored FILE` puts the authors' published runs, as
scripts/rescore.py scored them (`--json FILE`), in the place of our numbers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from proxytune.cli.guard import guarded
from proxytune.files import ROOT
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
        ours = paper_tables.from_rescored(json.loads(options.rescored.read_text()))
    else:
        paper_tables.collect(results / "runs", results / "metrics")
        ours = paper_tables.read_ours(results / "metrics")
    for number in options.table or NUMBERS:
        made = paper_tables.make(number, results, ours, pocket=options.pocket)
        if made is None:
            print(f"table {number}: nothing has been measured for it yet")
            continue
        name = f"{'pocket_' if options.pocket else ''}table{number}"
        path = results / "tables" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[1])
        made[0].to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
        Console().print(Markdown(made[1]))
        print(f"{path}\n")


if __name__ == "__main__":
    guarded(main, again="")
