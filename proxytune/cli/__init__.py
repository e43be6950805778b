"""The commands: `python run.py` (also `proxytune run`), `check`, `serve`, `watch`, and others.

composed.py    Hydra's entries
guard.py       how a command ends: mistakes and interrupts in one line, bugs in a traceback
sweep.py       which folder each point of a sweep writes to
serve.py       `proxytune serve`, and the line that serves the same by plain vLLM
playground.py  what the page of `proxytune serve` shows of a triple
helping.py     what --help prints
doctor.py      `proxytune doctor`: what an issue needs to know of a machine
watch.py       `proxytune watch`: a run in progress, as a page or as text
watch_server.py  serves that page to this machine
interrupts.py  SIGTERM and SIGHUP end a command as Ctrl-C does

This module imports nothing, so that a missing package is explained by `main`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from proxytune.errors import MissingExtra, extra

# command -> the extra of pyproject.toml that it needs
COMMANDS = {"run": "experiments", "check": "experiments", "serve": "serve", "vllm-command": "serve"}


def main() -> None:
    """Entry of the console script `proxytune`."""
    command = next(iter(sys.argv[1:]), "")
    if command == "doctor":
        from proxytune.cli.doctor import doctor

        doctor(sys.argv[2:])
        return
    if command == "watch":
        _watch(sys.argv[2:])
        return
    if command not in COMMANDS:
        from proxytune.cli.helping import overview

        if command in ("--help", "-h", "help"):
            _show(overview())
            return
        print(overview(), file=sys.stderr)
        if command:
            print(f"\nerror: there is no command {command}", file=sys.stderr)
        raise SystemExit(2)
    del sys.argv[1]
    _start(command)


def run() -> None:
    """Entry of run.py."""
    _start("run")


def _show(page: str) -> None:
    """Prints a page of help, of which `| head` may read a part."""
    from proxytune.cli.interrupts import hush

    with suppress(BrokenPipeError):
        print(page)
    hush()


@contextmanager
def _explained() -> Iterator[None]:
    """A package that is missing ends the command in one line."""
    try:
        yield
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _watch(words: Sequence[str]) -> None:
    with _explained(), extra("experiments", "proxytune watch"):
        from proxytune.cli.watch import watch
    watch(words)


def _start(command: str) -> None:
    with _explained(), extra(COMMANDS[command], f"proxytune {command}"):
        from proxytune.cli import composed, helping
    if helping.wants_help(sys.argv[1:]):
        _show(helping.page(command))
        return
    entries = {"run": composed.run, "check": composed.check, "serve": composed.serve}
    entries.get(command, composed.print_command)()
