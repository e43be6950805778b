"""Makes small results folders of invented runs that differ in a setting."""

import json
from pathlib import Path

from proxytune.files import write_json, write_jsonl
from proxytune.records import Completion, Example, MetricInfo, Prompt, Score
from proxytune.results import stats
from proxytune.results.folder import build_table

EXAMPLES = 20
RIGHT = {"base": 4, "expert": 8, "tuned": 16}


def identity(system, alpha, seed=None, dataset="da7a", **more):
    """A cell.json of a system whose proxy alone depends on alpha."""
    member = {
        "id": "m",
        "dtype": "float32",
        "revision": None,
        "weights": "abc",
        "format": {"kind": "raw"},
    }
    roles = ("base", "expert", "antiexpert") if system == "proxy" else ("base",)
    decoding = {"temperature": 0.0, "stop": ["\n"]}
    found = {
        "dataset": {"sha256": dataset, "examples": EXAMPLES},
        "system": system,
        "members": {
            role: member | {"id": f"{system if role == 'base' else role}"} for role in roles
        },
        "decoding": decoding if seed is None else decoding | {"temperature": 0.8, "seed": seed},
    }
    return found | ({"alpha": alpha} if system == "proxy" else {}) | more


def make_run(
    folder: Path,
    alpha=1.0,
    *,
    seed=None,
    right=None,
    examples=EXAMPLES,
    limit=None,
    task="gsm8k",
    systems=("base", "expert", "proxy", "tuned"),
    dataset="da7a",
    unfinished=0,
    texts="SYSTEM says VALUE of NUMBER",
    scored=True,
    settings=None,
):
    """One run; `right` of its proxy's answers are right, the others' never change."""
    right = {**RIGHT, "proxy": round(12 * alpha) if right is None else right}
    items = [
        Example(str(i), Prompt(raw=f"Question {i}: <b>what</b>?", user=""), str(i))
        for i in range(examples)
    ]
    write_jsonl(folder / task / "examples.jsonl", items)
    metrics = []
    for system in systems:
        cell = folder / task / system
        completions, scores = [], []
        for i, item in enumerate(items[: examples - unfinished]):
            value = float(i < right[system])
            text = texts.replace("SYSTEM", system).replace("VALUE", f"{value:.0f}")
            text = text.replace("NUMBER", item.id)
            completions.append(Completion(item.id, 0, text, text, [1] * 5, "eos"))
            scores.append(Score(item.id, {"acc": value}, str(int(value)), item.target))
        write_jsonl(cell / "completions.jsonl", completions)
        write_json(cell / "cell.json", identity(system, alpha, seed, dataset))
        if scored:
            write_jsonl(cell / "scores.jsonl", scores)
            metrics += stats.metrics(task, system, scores)
    if scored:
        lacking = {task: f"base {examples - unfinished} of {examples}"} if unfinished else None
        build_table(folder, metrics, {task: {"acc": MetricInfo("accuracy")}}, None, limit, lacking)
    run = {
        "name": "pocket",
        "config": {"name": "pocket", "alpha": alpha, "systems": list(systems)},
        "tasks": {task: {"_target_": "tasks.gsm8k.GSM8K", "path": str(folder)} | (settings or {})},
        "sessions": [{"started": "2026-11-26T10:00:00+00:00"}],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def make_sweep(folder: Path, alphas=(0.5, 1.0, 1.5), **more):
    """The points of a sweep over alpha."""
    return [make_run(folder / f"alpha={alpha}", alpha, **more) for alpha in alphas]
