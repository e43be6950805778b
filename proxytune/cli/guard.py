"""How a command ends: a user's mistake in one line, an interrupt in one line, a bug in a traceback.

HYDRA_FULL_ERROR=1 shows the traceback of a user's mistake, too.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from proxytune.cli.interrupts import Interrupted, hush, interruptible
from proxytune.config import given, schema
from proxytune.config.overrides import parameters
from proxytune.errors import UpstreamError, UserError, did_you_mean
from proxytune.files import shipped
from proxytune.secrets import redacted
from proxytune.terminal import visible

# what Hydra and OmegaConf say of a value that cannot be -> what to do about it
_WAYS_OUT = {
    "Value '(?P<value>.*)' of type .* converted to Float": "{key}={value}: it must be a number",
    "Value '(?P<value>.*)' of type .* converted to Int": "{key}={value}: it must be a whole number",
    "Value '(?P<value>.*)' is not a valid bool": "{key}={value}: it must be true or false",
    r"Merge error: .* subclass of ModelSpec\. value: (?P<value>.*)": "a model is {{id: {value}}}",
    r"Merge error: .* value: (?P<value>.*)": "{value} stands where settings (key: value) belong",
    "not a subclass of ModelSpec": "{key} is a model's settings; name it with {key}.id=...",
    "not a subclass of|Cannot assign .* to Dict": "{key} has settings of its own: {key}.NAME=...",
    "is not a ListConfig, list or tuple": "{key} is a list: {key}=[ONE,TWO]",
    "missing mandatory value": "{key} is missing; give {key}=...",
    "Could not override '(?P<group>.*)'": "{group} is no setting of this command; see its --help",
    "Ambiguous value for argument '(?P<name>[^']*?)=(?P<value>[^']*)'": (
        "{name}={value} has several values: {name}=[{value}] is a list, and -m before it a sweep"
    ),
    "is not Optional": "{key} needs a value, and null is none",
    "must be a string or a list. Got NoneType": "a group of conf/ cannot be null; leave it out",
}
# group -> what else may stand there than a file of conf/
_ALSO = {
    "triple": "triple=/path/mine.yaml is one of your own",
    "task": "lm_eval/NAME is any task of lm-evaluation-harness, /path/mine.yaml one of your own",
    "formula": "formula._target_=MODULE.NAME is a function of your own",
}
_SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
_REPORT = "This is a bug in proxytune: please report it, with the lines above."
_PACKAGE = Path(schema.__file__).parent.parent


def guarded(
    command: Callable[[], object], again: str = "the same command goes on where this run stopped"
) -> None:
    """Calls `command`; a user's mistake ends in one line on stderr and exit code 1.

    Ctrl-C, SIGTERM and SIGHUP end in one line, too, and exit code 130, 143 or 129.

    Args:
        command: the function to call.
        again: what the same command does if it is started again; said after an interrupt.
    """
    if sys.stderr is None or not sys.stderr.isatty():  # progress bars would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with interruptible():
            command()
            sys.stdout.flush()  # its errors are explained here, too
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        _say(f"{stopped.said}; {again}" if again else stopped.said)
        raise SystemExit(stopped.exit_code) from None
    except Exception as error:
        if not is_mistake(error):
            note = _whose(error)
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        if _SHOW_TRACEBACK:
            raise
        _say(f"error: {explain(error)}")
        raise SystemExit(1) from None
    finally:
        hush()


def _whose(error: BaseException) -> str:
    """Whose bug it is: a task, a judge or a formula may be the user's own code."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [file for file in files if file.is_relative_to(_PACKAGE)]
    library = (sys.prefix, sys.base_prefix, "<")
    others = [file for file in files if not str(file).startswith(library) and file not in ours]
    last = next((file for file in reversed(files) if file in ours or file in others), None)
    if last is None or last in ours:
        return _REPORT
    return f"If {last} is yours, mend it there; else t{_REPORT[1:]}"


def is_mistake(error: BaseException) -> bool:
    """Whether an error is the user's or the machine's, and not a bug of ours.

    An `OSError` with an errno is the machine's word: a full disk, a file that is not there.
    """
    if isinstance(error, HydraException) and error.__cause__ is not None:
        return is_mistake(error.__cause__)
    kinds = (UserError, UpstreamError, HydraException, OmegaConfBaseException, YAMLError)
    of_machine = isinstance(error, OSError) and error.errno is not None
    return isinstance(error, kinds) or of_machine or _of_library(error)


def _of_library(error: BaseException) -> bool:
    """Whether Hydra or lm-eval raised a plain ValueError: their word on a command line."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return isinstance(error, ValueError) and module.startswith(("hydra.", "lm_eval."))


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(visible(redacted(line)), file=sys.stderr, flush=True)


def explain(error: BaseException) -> str:
    """One line for a user's mistake: what was wrong, and the way out."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if (first := group.partition("/")[0]) in given.GROUPS:  # a path
            group, name = first, error.missing_cfg_file.removeprefix(f"{first}/")
        # Hydra gives none for a member of a list, task=[...]
        known = error.options or sorted(p.stem for p in (shipped("conf") / group).glob("*.yaml"))
        also = f"; {_ALSO[group]}" if group in _ALSO else ""
        return (
            f"unknown {group or 'config'} '{name}'{did_you_mean(name, known)}; "
            f"known: {', '.join(filter(None, known))}{also}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full, or your quota ({error.filename or 'results folder'}): free some "
            "space and run the same command again; everything finished so far is kept"
        )
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more; everything finished so far is kept"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {error.filename}; choose another folder with output_dir=..."
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read '{error.override}': a setting is key=value, without spaces around =, and "
            "a value with other signs than letters, digits and -_./:%+ is quoted, 'key=\"...\"'"
        )
    if isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    known = _of_configuration(error)
    if known is not None:
        return known
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("object_type=", "reference_type="))]
    return "; ".join(lines) or type(error).__name__


def _of_configuration(error: BaseException) -> str | None:
    """One line for what Hydra and OmegaConf say of a setting; None where theirs is kept."""
    composing = re.match(r"In '(.*)': \w+ raised while composing config:\n", str(error))
    file = f"{composing[1]}.yaml: " if composing else ""
    said = re.search(r"^\s*full_key: (\S*)", str(error), re.M)
    key = getattr(error, "full_key", None) or (said[1] if said else "")
    for pattern, way_out in _WAYS_OUT.items():
        if found := re.search(pattern, str(error)):
            return file + way_out.format(key=key, **found.groupdict())
    misspelt = re.search(r"^Key '(\w+)' not in '(\w+)'", str(error), re.M)
    kind = getattr(error, "object_type", None) if misspelt else None  # of train_expert.py, say
    kind = getattr(schema, misspelt[2], kind) if misspelt else None
    if misspelt and is_dataclass(kind):
        key, known = misspelt[1], [f.name for f in fields(kind)]
        known = [name for name in known if name != "root"]  # the checkout
        return f"{file}unknown key '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}"
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and "not in struct" in str(error):
        return _no_such_key(str(error.full_key), error.parent_node)
    return None


def _no_such_key(full_key: str, parent: Any) -> str:
    """One line for a key that is misspelt, or of a task or formula that is not chosen."""
    where, _, key = full_key.rpartition(".")
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    settings = parameters(parent) if isinstance(parent, DictConfig) else []
    if where == "formula" and not settings:
        files = sorted((shipped("conf") / "formula").glob("*.yaml"))
        having = [path.stem for path in files if f"\n{key}:" in path.read_text()]
        others = f"; {key} is a setting of formula={' or '.join(having)}" if having else ""
        return f"the chosen formula has no settings, so there is no {full_key}{others}"
    meant = did_you_mean(key, settings or known)
    if settings:
        return f"{where} has no key '{key}'{meant}; known: {', '.join(settings)}"
    if where == "task":
        chosen = f"chosen: {', '.join(known)}" if known else "none is"
        return f"task '{key}' is not chosen{meant}; {chosen}; task=[{key}] chooses it"
    names = f"; known: {', '.join(known)}" if known else ""
    return f"{where} has no key '{key}'{meant}{names}"
