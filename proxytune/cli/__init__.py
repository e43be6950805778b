"""The commands: `python run.py` (also `proxytune run`), `proxytune check`, `serve`, `vllm-command`.

composed.py    Hydra's entries
guard.py       how a command ends: mistakes and interrupts in one line, bugs in a traceback
serve.py       `proxytune serve`, and the line that serves the same by plain vLLM
interrupts.py  SIGTERM and SIGHUP end a command as Ctrl-C does

This module imports nothing, so that a missing package is explained by `main`.
"""

import sys

from proxytune.errors import MissingExtra, extra

# command -> the extra of pyproject.toml that it needs
COMMANDS = {"run": "experiments", "check": "experiments", "serve": "serve", "vllm-command": "serve"}


def main() -> None:
    """Entry of the console script `proxytune`."""
    command = next(iter(sys.argv[1:]), "")
    if command not in COMMANDS:
        for name in COMMANDS:
            print(f"usage: proxytune {name} [key=value ...]", file=sys.stderr)
        raise SystemExit(2)
    del sys.argv[1]
    _start(command)


def run() -> None:
    """Entry of run.py."""
    _start("run")


def _start(command: str) -> None:
    try:
        with extra(COMMANDS[command], f"proxytune {command}"):
            from proxytune.cli import composed
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    entries = {"run": composed.run, "check": composed.check, "serve": composed.serve}
    entries.get(command, composed.print_command)()
