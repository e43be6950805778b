"""Reproduces tables and figures of the paper: describes, checks, runs and renders each.

    python scripts/reproduce.py table2               on the real models (`make table2`)
    python scripts/reproduce.py table2 --size 13B    one size of them (`make table2 SIZE=13B`)
    python scripts/reproduce.py table2 --pocket      on the pocket family (`make table2 POCKET=1`)
    python scripts/reproduce.py --all --pocket       everything (`make pocket-paper`)
    python scripts/reproduce.py table5 --dry-run     only says and checks
    python scripts/reproduce.py table2 limit=20      more settings for every run.py

The targets are in conf/paper.yaml. If a check or a step fails, its target is skipped and the others
go on; a summary at the end lists what was made. Every step resumes, so after a crash the same
command continues.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.files import ROOT

if TYPE_CHECKING:
    from reproduce_checks import Step

TARGETS = ROOT / "conf" / "paper.yaml"
# Full tuning shards weights and moments over the GPUs (docs/training.md).
_SHARDED = shlex.split("--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP")
_PATIENCE_S = 20  # for a step to end after an interrupt
_CODE = "task.{}.allow_code_execution=true"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, describes and checks each target, then runs and renders it."""
    targets: dict[str, Any] = yaml.safe_load(TARGETS.read_text())
    options = _parse(arguments, targets)
    names = list(targets) if options.all else [n for n in options.words if "=" not in n]
    unknown = [name for name in names if name not in targets]
    if unknown or not names:
        wrong = f"unknown target {', '.join(unknown)}" if unknown else "no target given"
        raise UserError(f"{wrong}; targets are {', '.join(targets)} (or --all)")
    online = not options.pocket and hub_answers()
    if not online:  # set before the libraries are imported, so that they do not wait for the hub
        os.environ["HF_HUB_OFFLINE"] = "1"
    if options.pocket:  # a second thread does not speed up such small models
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan, outcome = _plan(targets, names, options, online)
    if not options.dry_run:
        _run_all(targets, plan, outcome, pocket=options.pocket)
    _summary({name: outcome[name] for name in names})
    if any(bad for bad, _ in outcome.values()):
        raise SystemExit(1)


def _parse(arguments: Sequence[str] | None, targets: Mapping[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TARGET or KEY=VALUE",
        help=f"any of {', '.join(targets)}; settings go to every run.py",
    )
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--pocket", action="store_true", help="on the pocket family, on a CPU")
    parser.add_argument("--size", choices=("13B", "70B"), help="only the paper's rows of this size")
    parser.add_argument("--dry-run", action="store_true", help="say and check, run nothing")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="let HumanEval and DS-1000 run the models' programs (in the sandbox)",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="run in spite of what the checks found"
    )
    return parser.parse_intermixed_args(arguments)


def hub_answers(seconds: float = 5) -> bool:
    """Whether the model hub can be reached and may be asked."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        with urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def _plan(
    targets: Mapping[str, Any], names: Sequence[str], options: argparse.Namespace, online: bool
) -> tuple[dict[str, list["Step"]], dict[str, tuple[bool, str]]]:
    """Describes and checks every target.

    Returns:
        The steps of each target that may run, and for every other one its outcome: whether that
        is bad, and the reason.
    """
    from reproduce_checks import Checker

    settings = [word for word in options.words if "=" in word]
    checker = Checker(online)
    plan: dict[str, list[Step]] = {}
    outcome: dict[str, tuple[bool, str]] = {}
    for name in names:
        print(f"\n{name}: {targets[name]['about']}")
        steps = steps_of(targets[name], pocket=options.pocket, size=options.size)
        steps = [_with_settings(s, settings, code=options.allow_code_execution) for s in steps]
        steps, problems = checker.check(steps)
        for step in steps:
            print(f"  {step.command}" + (f"\n      {step.needs()}" if step.needs() else ""))
        for problem in problems:
            print(f"  problem: {problem}")
        if options.size and targets[name]["steps"] and not steps:
            outcome[name] = False, f"has no rows of size {options.size}"
        elif problems and not options.anyway:
            outcome[name] = True, "not started: see its problems above"
        elif options.dry_run:
            outcome[name] = False, "ready"
        if name not in outcome:
            plan[name] = steps
    return plan, outcome


def steps_of(target: Mapping[str, Any], *, pocket: bool, size: str | None = None) -> list["Step"]:
    """A target's steps.

    Args:
        target: its entry in conf/paper.yaml.
        pocket: takes the steps on the pocket family.
        size: takes the steps of this size alone; None takes all.
    """
    from reproduce_checks import Step

    groups = {"all": target["pocket"]} if pocket else target["steps"]
    chosen = [s for name, group in groups.items() if pocket or size in (None, name) for s in group]
    steps = [Step(**s) if isinstance(s, dict) else Step(s) for s in chosen]
    return list(dict.fromkeys(steps))  # both sizes need the same small expert, trained once


def _with_settings(step: "Step", settings: Sequence[str], *, code: bool) -> "Step":
    """Adds the user's settings to a command of run.py; other commands stay unchanged."""
    script, *given = shlex.split(step.command)
    if script != "run.py":
        return step
    tasks = ("humaneval", "ds1000") if code and any("_code" in word for word in given) else ()
    added = [*settings, *(_CODE.format(task) for task in tasks)]
    return replace(step, command=" ".join([step.command, *map(shlex.quote, added)]))


def _run_all(
    targets: Mapping[str, Any],
    plan: Mapping[str, list["Step"]],
    outcome: dict[str, tuple[bool, str]],
    *,
    pocket: bool,
) -> None:
    """Runs and renders the planned targets; a step that several of them need runs once.

    Args:
        targets: conf/paper.yaml.
        plan: target -> steps.
        outcome: filled with the outcome of each target.
        pocket: renders the results of the pocket family.
    """
    results: dict[str, bool] = {}
    for name, steps in plan.items():
        start = time.time()
        render = targets[name]["render"] + (" --pocket" if pocket else "")
        for command in [*(_command(step) for step in steps), ["python", *shlex.split(render)]]:
            line = shlex.join(command)
            if line not in results or command[1].startswith("scripts/make_"):
                results[line] = _run(command)
            if not results[line]:
                outcome[name] = True, f"failed: `{line}`; the same command goes on from there"
                break
        else:
            made = _made(name, pocket=pocket)
            fresh = [p for p in made if p.is_file() and p.stat().st_mtime >= start - 1]
            names = ", ".join(str(p.relative_to(ROOT)) for p in fresh)
            outcome[name] = (False, names) if fresh else (True, f"{made[0]} was not written")


def _made(name: str, *, pocket: bool) -> list[Path]:
    """The files that a target's rendering writes."""
    prefix = "pocket_" if pocket else ""
    if name.startswith("fig"):
        stem = ROOT / "results" / "figures" / f"{prefix}{name}"
        return [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    return [ROOT / "results" / "tables" / f"{prefix}{name}.md"]


def _command(step: "Step") -> list[str]:
    """The step as a command; training runs on as many GPUs as can share its batch evenly."""
    from reproduce_checks import TRAIN, memory_gb, training_cards

    script, *given = shlex.split(step.command)
    cards = training_cards()
    if script != TRAIN or cards == 0:
        return ["python", script, *given]
    launch = ["-m", "accelerate.commands.launch"]
    launch += _SHARDED if memory_gb(0) < step.gpu_memory_gb else []
    return ["python", *launch, "--num_processes", str(cards), script, *given]


def _run(command: Sequence[str]) -> bool:
    """Runs a command; returns whether it succeeded."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.time()
    with subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT) as step:
        try:
            status = step.wait()
        except KeyboardInterrupt:  # let the step end in good order, before we do
            step.terminate()
            with suppress(subprocess.TimeoutExpired):
                step.wait(_PATIENCE_S)
            step.kill()
            raise
    print(f"({time.time() - start:.0f} s)", flush=True)
    return status == 0


def _summary(outcome: Mapping[str, tuple[bool, str]]) -> None:
    """Prints the outcome of each target."""
    print()
    for name, (bad, text) in outcome.items():
        print(f"{'NO ' if bad else 'ok '} {name:<8} {text}", flush=True)


if __name__ == "__main__":
    guarded(main)
