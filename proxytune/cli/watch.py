"""`proxytune watch RUN`: a run in progress, as a page on this machine or as text (--once)."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.cli.guard import guarded
from proxytune.errors import UserError, extra
from proxytune.terminal import one_line

if TYPE_CHECKING:  # they import pandas and scipy, which --help needs not
    from proxytune.experiment.watched_cell import CellState
    from proxytune.experiment.watching import RunState

_EXAMPLES = """\
examples:
  proxytune watch results/runs/pocket              a page on a free port of this machine
  proxytune watch results/runs/pocket --port 8001  on this port, for `ssh -L 8001:localhost:8001`
  proxytune watch results/runs/pocket --once       as text, where there is no browser

The folder is only read. It can be watched while the run goes on, and after it was killed.
"""
_LINES = 4  # completions in the terminal


def watch(words: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="proxytune watch",
        description="Shows a run in progress: what is done, scores so far, the latest completions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="its results folder")
    parser.add_argument("--once", action="store_true", help="print it once, as text")
    parser.add_argument(
        "--port", type=int, default=0, help="of the page, on 127.0.0.1; 0 (the default) is any"
    )
    given = parser.parse_args(words)
    guarded(lambda: _watch(given.run, given.once, given.port), again="")


def _watch(folder: Path, once: bool, port: int) -> None:
    with extra("experiments", "proxytune watch"):
        from proxytune.cli.watch_server import WatchServer
        from proxytune.experiment.watching import Watcher

    watcher = Watcher(folder)
    if once:
        print("\n".join(as_text(watcher.look())))
        return
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: a port is a number up to 65535; 0 takes a free one")
    with WatchServer(watcher, port) as server:
        print(f"watching {folder} on {server.url}  (Ctrl-C ends it, not the run)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def as_text(state: "RunState") -> Iterator[str]:
    """The lines of a state for a terminal."""
    yield f"{one_line(state.name)}: {state.said}"
    yield ""
    rows = [("system", "task", "examples", "tokens/s", "score so far, 95 % interval")]
    rows += [_row(cell) for cell in state.cells]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for system, task, done, speed, score in rows:
        left = f"  {system:<{widths[0]}}  {task:<{widths[1]}}  {done:>{widths[2]}}"
        yield f"{left}  {speed:>{widths[3]}}  {score}".rstrip()
    for each in state.latest[:_LINES]:
        yield ""
        yield f"{each.system}, {one_line(each.task)}, example {one_line(each.example)}:"
        yield f"  {one_line(each.text)[:300]}"


def _row(cell: "CellState") -> tuple[str, str, str, str, str]:
    done = f"{cell.done:,} of {cell.total:,}" if cell.total else "–"
    speed = "" if cell.speed is None else f"{cell.speed:,.{int(cell.speed < 10)}f}"
    return cell.system, one_line(cell.task), done, speed, _score(cell)


def _score(cell: "CellState") -> str:
    if cell.problem:
        return one_line(cell.problem)
    if cell.value is None:
        return ""
    between = "" if cell.low is None else f" ({cell.low:.1f}–{cell.high:.1f})"
    of = f", of {cell.scored:,}" if cell.scored < cell.total else ""
    return f"{one_line(cell.metric)} {cell.value:.1f}{between}{of}"
