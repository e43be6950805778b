"""What `--help` prints: the groups of conf/ with a line each, what may be set, and examples.

Hydra's own page lists all composed values, which `--cfg job` prints, too. This module reads names
of files and docstrings alone, so that help comes at once.
"""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from textwrap import fill

from proxytune.files import shipped

COMMANDS = {
    "run": "runs the systems of an experiment on its tasks",
    "check": "tries a triple on a few examples of a task: helps, hurts, or cannot tell",
    "serve": "serves a triple by OpenAI's HTTP protocol, with a playground if you like",
    "vllm-command": "prints the line that serves a triple by plain vLLM",
    "watch": "shows a run in progress: progress, scores so far, the latest completions",
    "doctor": "prints versions, devices, memory and what can be reached, for an issue",
}
# group -> what is chosen by it
GROUPS = {
    "experiment": "a whole comparison: triple, tasks, machine",
    "triple": "the models; a file anywhere is triple=/path/mine.yaml",
    "task": "what is asked: task=[gsm8k,toxigen]; any task of lm-eval is task=[lm_eval/NAME]",
    "formula": "how the members' logits are combined; yours is formula._target_=MODULE.NAME",
    "decoding": "speed, seed, and settings that override every task's",
    "machine": "devices and threads",
    "engine": "what runs the models",
    "tracking": "where a run is logged",
}
_CHECKED = ("triple", "task", "formula", "decoding", "machine", "engine")
_SERVED = ("triple", "formula", "machine", "engine")
_EXAMPLES = {
    "run": (
        ("python run.py", "the pocket experiment, offline"),
        ("python run.py experiment=qwen25_7b_chat limit=20", "a smoke run of a real triple"),
        ("python run.py triple=/path/mine.yaml task=[gsm8k] experiment=none name=mine", "yours"),
        ("python run.py -m alpha=0.5,1.0,1.5", "a sweep"),
        ("python run.py stage=score", "score stored completions again, without a model"),
    ),
    "check": (
        ("proxytune check triple=pocket task=pocket_gsm8k", "the pocket triple on 50 examples"),
        ("proxytune check triple=/path/mine.yaml task=gsm8k limit=200", "yours"),
    ),
    "serve": (
        ("proxytune serve triple=pocket", "the OpenAI protocol on port 8000"),
        ("proxytune serve triple=pocket playground=true", "and a page that explains tokens"),
        ("proxytune serve triple=/path/mine.yaml port=0", "any free port"),
        ("proxytune serve triple=pocket system=base", "one model alone"),
        ("proxytune serve triple=pocket engine=vllm", "by vLLM, in its environment"),
    ),
    "vllm-command": (("proxytune vllm-command triple=qwen25_7b", "a line to paste"),),
}
_WIDTH = 96


def wants_help(words: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in ("--help", "-h") for word in words)


def overview() -> str:
    """The page of `proxytune --help`."""
    lines = ["usage: proxytune COMMAND [key=value ...]", ""]
    lines += [f"  {name:14}{about}" for name, about in COMMANDS.items()]
    lines += ["", "`python run.py` is `proxytune run`."]
    lines += ["proxytune COMMAND --help has its settings and examples."]
    return "\n".join(lines)


def page(command: str) -> str:
    """The page of one command.

    Args:
        command: run, check, serve or vllm-command.
    """
    program = "python run.py" if command == "run" else f"proxytune {command}"
    groups = {"run": GROUPS, "check": _CHECKED}.get(command, _SERVED)
    lines = [f"usage: {program} [group=option ...] [key=value ...]", "", COMMANDS[command], ""]
    lines += ["Groups (group=option):", ""]
    for group in groups:
        lines.append(f"  {group:12}{GROUPS[group]}")
        lines.append(_wrapped(", ".join(_options(group)), 14, 14))
    lines += ["", "Settings (key=value; every key of a group, too: machine.device=cuda:1):", ""]
    for name, about in _settings(command):
        lines.append(_wrapped(f"{name:<20}{about}", 2, 22))
    lines += ["", "Examples:", ""]
    lines += [f"  {line}\n      {about}" for line, about in _EXAMPLES[command]]
    lines += ["", f"{program} ... --cfg job prints every value that is composed."]
    if command == "run":
        lines.append('eval "$(python run.py -sc install=bash)" lets Tab complete groups and keys.')
    return "\n".join(lines)


def _wrapped(text: str, first: int, others: int) -> str:
    """A text in lines, the first and the others indented by so many columns."""
    return fill(text, _WIDTH, initial_indent=" " * first, subsequent_indent=" " * others)


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (shipped("conf") / group).glob("*.yaml"))


def _settings(command: str) -> Iterator[tuple[str, str]]:
    """The keys of a command's schema that are no groups, with what their docstring says."""
    from proxytune.config import schema
    from proxytune.server.settings import ServerSettings

    kinds = {"run": [schema.RunConfig], "check": [schema.CheckConfig]}.get(
        command, [schema.ServeConfig, ServerSettings]
    )
    for kind in kinds:
        assert is_dataclass(kind)
        for name, about in attributes(kind.__doc__ or ""):
            if name.partition(",")[0] not in GROUPS and name != "root":
                yield name, about


def attributes(docstring: str) -> Iterator[tuple[str, str]]:
    """The names and texts under "Attributes:" of a docstring."""
    _, _, part = docstring.partition("Attributes:\n")
    for entry in re.split(r"\n(?= {8}\S)", part.rstrip()):
        names, _, about = entry.strip().partition(":")
        if about:
            yield names, " ".join(about.split())
