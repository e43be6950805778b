"""Draws one example's answers by the four systems, the proxy's tokens shaded: README's picture.

python scripts/make_picture.py results/runs/pocket                    docs/answers.svg
python scripts/make_picture.py RUN --task gsm8k --example 7 --output x.svg
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from proxytune.cli.guard import guarded
from proxytune.files import ROOT, replace_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the results folder of a traced run")
    parser.add_argument("--task", default="pocket_gsm8k", help="a folder in it")
    parser.add_argument("--example", help="its id; default: the first that tells them apart")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "answers.svg")
    options = parser.parse_args(arguments)
    from proxytune.results.picture import picture

    replace_file(options.output, picture(options.run, options.task, options.example).encode())
    print(options.output)


if __name__ == "__main__":
    guarded(main, again="")
