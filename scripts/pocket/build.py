"""Rebuilds the pocket family from nothing: data, pretraining, tuning, evaluation.

    python -m scripts.pocket.build                 # what `make pocket` runs
    python -m scripts.pocket.build --seeds 1 2 3 --split dev

It takes less than an hour on two idle cores, mostly for pretraining. Models in the work folder are
not made again. scripts/train_expert.py tunes the experts and run.py evaluates them, as for real
models. Each tuning seed gets a run of its own, and results/pocket/<split>.csv its metrics. The
first seed's models are the ones in the repository.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from proxytune.files import ROOT
from scripts.pocket import files
from scripts.pocket.world import Split

MODELS = ROOT / "pocket" / "models"
DATA = ROOT / "pocket" / "data"
RESULTS = ROOT / "results" / "pocket"
PRETRAINED = {"base": "large", "antiexpert": "small"}
PROCESSES = 2  # at once, with one thread each
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
TASKS = {  # task -> its file or folder in pocket/data/<split>
    "gsm8k": "gsm8k.jsonl",
    "triviaqa": "triviaqa.jsonl",
    "truthfulqa_open": "TruthfulQA.csv",
    "truthfulqa_mc": "TruthfulQA.csv",
    "toxigen": "toxigen",
    "toxigen_neutral": "toxigen",
    "humaneval": "humaneval.jsonl",
    "realtimeqa": "realtimeqa",
}
Figure = dict[str, Any]  # a row of results/pocket/*.csv
COLUMNS = ("task", "metric", "system", "seed", "value", "low", "high", "n")
GAP = "gap closed"
THINKS = "{%- if add_generation_prompt -%}{{- ' <think>' -}}{%- endif -%}"


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned; steps and rates were chosen on dev (docs/pocket.md).

    Attributes:
        origin: the pretrained model.
        data: the file of pocket/data/tuning.
        steps: optimiser steps of 32 examples.
        rate: the peak learning rate.
        seeds: whether each seed of the build gets one; the first one otherwise.
    """

    origin: str
    data: str
    steps: int
    rate: float
    seeds: bool = False


TUNED = {
    "tuned": Tuning("base", "chat", 400, 5e-4, seeds=True),
    "expert": Tuning("antiexpert", "chat", 300, 5e-4, seeds=True),
    "expert_news": Tuning("antiexpert", "news", 600, 1e-3, seeds=True),
    "expert_arithmetic": Tuning("antiexpert", "arithmetic", 300, 5e-4, seeds=True),
    "expert_knowledge": Tuning("antiexpert", "knowledge", 300, 5e-4, seeds=True),
    "expert_thinking": Tuning("antiexpert", "thinking", 300, 5e-4, seeds=True),
    "overtuned": Tuning("antiexpert", "chat", 1200, 2e-3),  # on purpose: docs/check.md
}


def pretrain(work: Path) -> None:
    """Pretrains both base models in parallel, one thread each, and copies them to MODELS."""
    missing = [role for role in PRETRAINED if not (work / role / "done").exists()]
    module = [sys.executable, "-m", "scripts.pocket.pretrain"]
    running = {
        role: subprocess.Popen(
            [*module, "--size", PRETRAINED[role], "--out", str(work / role)],
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
        )
        for role in missing
    }
    for role, process in running.items():
        if process.wait() != 0:
            raise SystemExit(f"the pretraining of {role} failed (its last lines are above)")
        (work / role / "done").touch()
    for role in PRETRAINED:
        ship(work / role, MODELS / role)


def ship(source: Path, target: Path) -> None:
    """Copies a model and its tokenizer; half precision halves the download of its weights.

    It does not copy what differs between two trainings on the same machine: train.json, which holds
    the training's time, and whether the hub could be reached.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.init_kwargs["local_files_only"] = False  # would be true in offline mode
    tokenizer.save_pretrained(target)


def tune(work: Path, seed: int, role: str, tuning: Tuning) -> None:
    """Tunes one model from those in MODELS, unless the work folder has it already."""
    output = work / f"seed{seed}" / role
    settings = {
        "model": (MODELS / tuning.origin).relative_to(ROOT),
        "data": (DATA / "tuning" / f"{tuning.data}.jsonl").relative_to(ROOT),
        "output_dir": work / f"seed{seed}" / f"{role}_float32",
        "steps": tuning.steps,
        "learning_rate": tuning.rate,
        "batch_size": 32,
        "per_device_batch_size": 32,
        "max_length": 256,
        "seed": seed,
        "threads": 1,
        "progress": "false",
    }
    if output.exists():
        return
    _run("scripts/train_expert.py", [f"{key}={value}" for key, value in settings.items()])
    ship(Path(str(settings["output_dir"])), output)
    if tuning.data == "thinking":
        with (output / "chat_template.jinja").open("a", encoding="utf-8") as file:
            file.write(THINKS)


def on_split(split: Split, tasks: Sequence[str]) -> list[str]:
    """The settings that put pocket tasks on a split's files.

    Args:
        split: dev or test.
        tasks: keys of `TASKS`; a run takes settings of the tasks that it has.
    """
    groups = ",".join(g.lower() for g in files.groups(split))
    settings = [f"task.pocket_{task}.path={DATA / split / TASKS[task]}" for task in tasks]
    settings += [f"task.pocket_{t}.groups=[{groups}]" for t in tasks if t.startswith("toxigen")]
    if "truthfulqa_open" in tasks:
        settings += [
            f"task.pocket_truthfulqa_open.{judge}.path={DATA / split / TASKS['truthfulqa_open']}"
            for judge in ("truth_judge", "info_judge")
        ]
    return settings


def measure(output: Path, seed: int, settings: Sequence[str]) -> list[Figure]:
    """Runs run.py, or goes on with its results folder; returns the figures of its tables.

    Returns:
        A row per task, metric and system, with its 95 % interval; the gap closed is a system of
        this name, its interval that of paired examples. Shares, not percent.
    """
    _run("run.py", [*settings, f"output_dir={output}", "report=false", "decoding.trace=false"])
    rows: list[Figure] = []
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append(row | {"seed": seed, "low": row["ci_low"], "high": row["ci_high"]})
    with (output / "table.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("gap_closed"):
                names = {"value": "", "low": "_low", "high": "_high"}
                gap = {name: _share(row[f"gap_closed{end}"]) for name, end in names.items()}
                rows.append(row | gap | {"system": GAP, "seed": seed})
    return rows


def _share(percent: str) -> float | None:
    return float(percent) / 100 if percent else None


def evaluate(work: Path, seed: int, split: Split) -> list[Figure]:
    """Runs the pocket experiments with one seed's models; returns their figures."""
    tuned = work / f"seed{seed}"
    main = [task for task in TASKS if task != "realtimeqa"]
    experiments = {
        "pocket": [
            *(f"triple.{role}.id={tuned / role}" for role in ("expert", "tuned")),
            *on_split(split, main),
        ],
        "pocket_black_box": [
            f"triple.expert.id={tuned / 'expert_news'}",
            *on_split(split, ["realtimeqa"]),
        ],
    }
    rows = []
    for name, settings in experiments.items():
        rows += measure(tuned / f"{split}_{name}", seed, [f"experiment={name}", *settings])
    return rows


def _run(script: str, arguments: Sequence[str]) -> None:
    subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=os.environ | ONE_THREAD, check=True
    )


def write_figures(path: Path, rows: Sequence[Figure], columns: Sequence[str] = COLUMNS) -> None:
    """Writes figures as a table, without the metrics of single groups ("toxicity/zoups")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [row for row in rows if "/" not in str(row["metric"])]
    shown = sorted(shown, key=lambda row: [str(row[c]) for c in columns[: columns.index("value")]])
    for row in shown:
        row |= {c: round(float(row[c]), 6) for c in ("value", "low", "high") if row[c] is not None}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(shown)


def main() -> None:
    """Reads the command line and builds what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "runs" / "pocket_build")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split", choices=("dev", "test"), nargs="+", default=["dev", "test"])
    args = parser.parse_args()
    files.write(DATA)
    pretrain(args.work)
    first = args.seeds[0]
    with ThreadPoolExecutor(PROCESSES) as pool:
        # the base takes longest to tune, so it comes first
        jobs = [(seed, role, each) for role, each in TUNED.items() for seed in args.seeds]
        jobs = [job for job in jobs if job[0] == first or job[2].seeds]
        list(pool.map(lambda job: tune(args.work, *job), jobs))
        for role in TUNED:
            shutil.rmtree(MODELS / role, ignore_errors=True)
            shutil.copytree(args.work / f"seed{first}" / role, MODELS / role)
        for split in args.split:
            found = pool.map(partial(evaluate, args.work, split=split), args.seeds)
            write_figures(RESULTS / f"{split}.csv", [row for rows in found for row in rows])


if __name__ == "__main__":
    main()
