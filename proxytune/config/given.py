"""Files of one's own on the command line: triple=/path/mine.yaml as if it were in conf/triple."""

import re
from collections.abc import Sequence
from pathlib import Path

from proxytune.errors import UserError
from proxytune.files import shipped

GROUPS = (
    *("triple", "task", "experiment", "formula"),
    *("decoding", "machine", "engine", "tracking", "train"),
)

# "triple/mine" -> the file; hydra_plugins/given_source.py shows them to Hydra
FILES: dict[str, Path] = {}


def take(arguments: Sequence[str]) -> list[str]:
    """Replaces files by their names, and remembers them.

    Args:
        arguments: of a command, as Hydra takes them.

    Raises:
        UserError: a file is not there, or has the name of one in conf/.
    """
    return [_taken(argument) for argument in arguments]


def _taken(argument: str) -> str:
    group, _, value = argument.partition("=")
    if group not in GROUPS:
        return argument
    file = r"[^\[\],]+\.ya?ml(?=[\],]|$)"  # one of a list, or of a sweep's values, too
    return f"{group}={re.sub(file, lambda found: _name(group, found[0].strip()), value)}"


def _name(group: str, given: str) -> str:
    """Remembers a file; its name in the group."""
    path = Path(given).expanduser()
    ours = shipped("conf") / group / f"{path.stem}.yaml"
    if not path.is_file():
        other = f"; proxytune's own is {group}={path.stem}" if ours.is_file() else ""
        raise UserError(f"{group}={given}: there is no such file{other}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise UserError(f"{group}={given}: the file's name takes letters, digits, _ and - alone")
    if ours.is_file() and not ours.samefile(path):
        raise UserError(
            f"{group}={given}: proxytune has a {group} of the name {path.stem}; rename the file"
        )
    FILES[f"{group}/{path.stem}"] = path.resolve()
    return path.stem
