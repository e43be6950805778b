"""The paper's tables that compare no systems: tokens (6), speed (12) and training time (14).

They read traces, benchmarks and training records instead of comparison tables.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from proxytune.files import ROOT, read_json
from proxytune.results import analysis, paper, tables
from proxytune.results.comparison import OTHER_DATASET, records
from proxytune.results.run_json import read_run_json

# in fewer tokens than this, hardly any token type occurs 100 times
_FEW_TOKENS = 50_000


class Made(NamedTuple):
    """A table as data and as Markdown."""

    data: pd.DataFrame
    markdown: str


class Maker(Protocol):
    """Makes a table from the folder of results; None where nothing has been measured."""

    def __call__(self, results: Path, *, pocket: bool) -> Made | None: ...  # noqa: D102


def table6(results: Path, *, pocket: bool) -> Made | None:
    """The tokens that proxy-tuning promotes most on open questions, and the test on equations."""
    rows: list[dict[str, Any]] = []
    parts = ["# Table 6", "Tokens that proxy-tuning promotes most; mean of p_proxy − p_base."]
    for run, task, texts in traced(results / "runs", pocket=pocket):
        other = read_run_json(run).get("other_datasets", {}).get(task)
        note = [f"{OTHER_DATASET} ({other})"] if other else []
        key = paper.key_of(task, "info_true") or paper.key_of(task, "acc")
        pieces = analysis.load_pieces(run)
        if pieces is None:
            print(f"{run}: its tokenizer is not here, so its tokens have no names")
            continue
        if key == "truthfulqa_info_true":
            least = 100 if sum(len(text.ids) for text in texts) >= _FEW_TOKENS else 10
            found = analysis.most_promoted(texts, pieces, min_count=least)
            rows += [{"run": run.name, "task": task} | asdict(p) for p in found]
            body = [[p.token, f"{p.mean_delta:+.3f}", str(p.count), f"`{p.ngram}`"] for p in found]
            head = ["token", "mean rise", "count", "commonest 4-gram"]
            parts += [f"## {run.name}, {task}: types chosen at least {least} times"]
            parts += [tables.markdown_table(head, body, 1), *note]
        if key == "gsm_acc":
            test = analysis.compare_sides(texts, pieces)
            parts += [
                f"## {run.name}, {task}: equations (section 6.1)",
                f"Left-hand sides {test.left_mean:.3f} ({test.left_tokens:,} tokens), right-hand "
                f"sides {test.right_mean:.3f} ({test.right_tokens:,} tokens), Welch's t = "
                f"{test.t:.2f}, p = {test.p_value:.2g}. The paper, at 13B: 0.131 (14,104), 0.056 "
                "(16,452), p < 1e-4.",
                *note,
            ]
    return Made(pd.DataFrame(rows), "\n\n".join(parts) + "\n") if len(parts) > 2 else None


def traced(runs: Path, *, pocket: bool) -> Iterator[tuple[Path, str, list[analysis.Moves]]]:
    """Yields folder, task and traced proxy completions of the runs that belong to Table 2."""
    for path in sorted(runs.glob("*/run.json")):
        config = read_run_json(path.parent)["config"]
        place = config.get("paper") or {}
        if place.get("table") != "2" or pocket != (place.get("size") == paper.POCKET_SIZE):
            continue
        for task in config.get("task", {}):
            texts = analysis.read_moves(path.parent / task / "proxy")
            if texts:
                yield path.parent, task, texts


def table12(results: Path, *, pocket: bool) -> Made | None:
    """Seconds per generation of tuned and proxy, and their ratio beside the paper's."""
    path = results / "bench" / f"{'pocket_' if pocket else ''}table12.json"
    if not path.is_file():
        return None
    bench = read_json(path, hardware=dict)
    numbers = paper.numbers()
    theirs = {
        (r["size"], r["system"], r["metric"]): r["value"]
        for r in records(numbers)
        if r["table"] == "12"
    }
    rows = []
    for name, seconds in bench["table12_seconds"].items():
        lengths = name.replace(" ", "").strip("()")
        row = {"prompt,output": lengths, "tuned_s": seconds["tuned"], "proxy_s": seconds["proxy"]}
        row["ratio"] = bench["table12_proxy_over_tuned"][name]
        for size in paper.SIZES:
            metric = f"s_per_generation({lengths})"
            if (size, "tuned", metric) in theirs:
                ratio = theirs[size, "proxy", metric] / theirs[size, "tuned", metric]
                row[f"paper_{size}"] = ratio
        rows.append(row)
    table = pd.DataFrame(rows)
    hardware = bench["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    head = ["prompt, output tokens", "tuned, s", "proxy, s", "proxy / tuned", "paper 13B", "70B"]
    body = [
        [str(r["prompt,output"]), f"{r['tuned_s']:.3f}", f"{r['proxy_s']:.3f}"]
        + [f"{r[c]:.2f}×" if c in r else tables.DASH for c in ("ratio", "paper_13B", "paper_70B")]
        for r in records(table)
    ]
    text = (
        f"# Table 12\n\nSeconds per generation at batch 1 ({bench['size']} random models, {where}; "
        f"the paper: A100s).\n\n{tables.markdown_table(head, body, 1)}\n"
    )
    return Made(table, text)


def table14(results: Path, *, pocket: bool) -> Made | None:
    """Training time of the finished trainings, beside the paper's; loading and saving left out."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("experts/*/train.json")):
        record = read_json(path, config=dict, environment=dict)
        config, hardware = record["config"], record["environment"]["hardware"]
        of_pocket = Path(ROOT, config["model"]).is_relative_to(ROOT / "pocket")
        if record.get("status") != "finished" or pocket != of_pocket:
            continue
        kind = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['processor']} core"
        rows.append(
            {
                "model": config["model"],
                "tuning": config["method"],
                "data": config["data"],
                "examples": record["data"]["examples"],
                "steps": record["steps"],
                "tokens": record["tokens"],
                "seconds": record["seconds"],
                "devices": f"{record['devices']} x {kind}",
                "paper_hours": paper.training_hours(
                    config["model"], config["method"], config["data"]
                ),
            }
        )
    if not rows:
        return None
    body = [[shown(row) for shown in _SHOWN_14.values()] for row in rows]
    text = (
        "# Table 14\n\nTraining time on the clock, loading and saving left out; the paper's on its "
        f"own machines.\n\n{tables.markdown_table(list(_SHOWN_14), body, 3)}\n"
    )
    return Made(pd.DataFrame(rows), text)


def _duration(seconds: float) -> str:
    if not seconds:
        return tables.DASH
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{minutes // 60} h {minutes % 60:02} min"


_SHOWN_14: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: row["model"],
    "tuning": lambda row: row["tuning"],
    "data": lambda row: row["data"],
    "examples": lambda row: f"{row['examples']:,}",
    "steps": lambda row: f"{row['steps']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "time": lambda row: _duration(row["seconds"]),
    "on": lambda row: row["devices"],
    "the paper": lambda row: _duration(3600 * (row["paper_hours"] or 0)),
}


MAKERS: dict[str, Maker] = {"6": table6, "12": table12, "14": table14}
