"""Files of one's own on the command line: triple=/path/mine.yaml as if it were in conf/triple."""

import re
from collections.abc import Sequence
from pathlib import Path

from proxytune.errors import UserError
from proxytune.files import shipped

GROUPS = ("triple", "task", "experiment", "decoding", "machine", "engine", "tracking", "train")

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
    found = re.fullmatch(rf"({'|'.join(GROUPS)})=(.+\.ya?ml)", argument)
    if not found:
        return argument
    group, path = found[1], Path(found[2]).expanduser()
    if not path.is_file():
        raise UserError(f"{argument}: there is no such file")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise UserError(f"{argument}: the file's name takes letters, digits, _ and - alone")
    ours = shipped("conf") / group / f"{path.stem}.yaml"
    if ours.is_file() and not ours.samefile(path):
        raise UserError(
            f"{argument}: proxytune has a {group} of the name {path.stem}; rename the file"
        )
    FILES[f"{group}/{path.stem}"] = path.resolve()
    return f"{group}={path.stem}"
