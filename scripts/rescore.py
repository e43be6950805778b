"""Scores stored completions again, without a GPU, and compares with the stored metrics.

    python scripts/rescore.py DIR [--only gsm,truthfulqa] [--json OUT] [--sample-verdicts]
                              [--no-code-execution | --allow-code-execution]

DIR is a results folder of ours (with a run.json), or a release in the layout of the paper's
authors: benchmark/system/files, each file gzipped or not. A file's columns say which benchmark it
is, so benchmarks and systems may have any name:

    predictions.jsonl + metrics.json          GSM8K, HumanEval (or DS-1000), ToxiGen
    predictions_results.jsonl                 HumanEval's verdict on every sample
    mc_results.jsonl + mc_metrics.json        TruthfulQA, multiple choice
    open_results.jsonl + open_metrics.json    TruthfulQA, open-ended
    annotations.json + metrics.json           AlpacaFarm

Prints benchmark, system, metric, published, ours, equal (at 1e-12), and the reason for each skipped
file. The exit status is 1 if anything differs or a file is malformed. The programs of a release run
in the sandbox, unless --no-code-execution is given; those of a results folder, which may be a
stranger's, only with --allow-code-execution. Judges, paths and interpreters are those of conf/task,
never the folder's.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rescore_release import MISFITS, Comparison, Run, check_only, mean, score_release

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.experiment.completions import lacks, read_completions
from proxytune.files import check_plain_files, read_json, read_jsonl
from proxytune.records import Example, Metric
from proxytune.terminal import visible
from tasks.stored import stored_task

log = logging.getLogger("rescore")


# -- a results folder of ours --------------------


def score_results(folder: Path, only: Sequence[str], to: Comparison) -> None:
    """Scores the completions of a results folder again, with the tasks of its run.json."""
    check_plain_files(folder)
    tasks = read_json(folder / "run.json", tasks=dict)["tasks"]
    check_only(only, tasks.keys())
    stored = {
        (m.task, m.system, m.metric): m.value for m in read_jsonl(folder / "metrics.jsonl", Metric)
    }
    for name, settings in tasks.items():
        if only and name not in only:
            continue
        task = stored_task(name, settings, allow_code_execution=to.run_code is True)
        if isinstance(task, type):
            reason = "lm-evaluation-harness scores while it asks; its numbers stand in result.json"
            to.skipped.append((name, "all", reason))
            continue
        for path in sorted((folder / name).glob("*/completions.jsonl")):
            _score_cell(Run(path.parent, to), task, path, stored)


def _score_cell(
    run: Run, task: Any, path: Path, stored: Mapping[tuple[str, str, str], float]
) -> None:
    """Scores one system's completions on one task again."""
    log.info("%s/%s", run.benchmark, run.folder.name)
    done = read_completions(path)
    examples = list(read_jsonl(path.parent.parent / "examples.jsonl", Example))
    n = 1 + max((sample for samples in done.values() for sample in samples), default=-1)
    whole = [e for e in examples if e.id in done and not lacks(done, e, n)]
    if len(whole) < len(examples):
        run.skip(f"{len(examples) - len(whole)} of {len(examples)} examples lack samples")
    if not whole:
        return
    judges = path.with_name("judges.json")
    if judges.is_file() and read_json(judges) != task.judged_by():
        run.skip("another judge scored it (judges.json); run.py stage=score asks yours")
        return
    texts = [[done[e.id][sample].text for sample in range(n)] for e in whole]
    try:
        task.check()
        scores = task.score_all(whole, texts)
    except UserError as error:  # a judge is missing, or programs may not be run
        run.skip(str(error))
        return
    except MISFITS as error:
        why = f"examples.jsonl does not fit the task ({error!r})"
        run.to.malformed.append((run.benchmark, run.folder.name, why))
        return
    for metric in sorted({m for s in scores for m, v in s.values.items() if v is not None}):
        key = (run.benchmark, run.folder.name, metric)
        if key in stored:
            run.compare(metric, stored[key], mean(scores, metric))
        else:
            run.skip(f"metrics.jsonl has no {metric}")


# -- the command --------------------


def rescore(
    folder: Path, only: Sequence[str] = (), *, samples: bool = False, run_code: bool | None = None
) -> Comparison:
    """Scores a release or a results folder again.

    Args:
        folder: a results folder or a release; see the module.
        only: benchmarks to score; empty is all.
        samples: whether to compare the published verdict on each sample, too.
        run_code: whether to run the stored programs in the sandbox; None runs a release's only.

    Raises:
        UserError: the folder holds nothing to score.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    ours = (folder / "run.json").is_file()
    comparison = Comparison(samples=samples, run_code=not ours if run_code is None else run_code)
    (score_results if ours else score_release)(folder.resolve(), only, comparison)
    if not (comparison.rows or comparison.skipped or comparison.malformed):
        raise UserError(f"{folder} holds neither run.json nor benchmark/system/metrics.json")
    return comparison


def show(comparison: Comparison, seconds: float) -> str:
    """The comparison as text."""
    lines = []
    shown = [*comparison.rows, *(row for row in comparison.sample_rows if not row["equal"])]
    if shown:
        cells = [row | {"equal": "yes" if row["equal"] else "NO"} for row in shown]
        table = pd.DataFrame(cells, dtype=object)
        lines.append(table.to_string(index=False, formatters={"published": str, "ours": str}))
    lines += [f"skipped {b}/{s}: {reason}" for b, s, reason in comparison.skipped]
    lines += [f"MALFORMED {b}/{s}: {reason}" for b, s, reason in comparison.malformed]
    for rows, what in ((comparison.rows, "metrics"), (comparison.sample_rows, "samples")):
        if rows:
            lines.append(f"{sum(bool(r['equal']) for r in rows)} of {len(rows)} {what} equal")
    lines.append(f"in {seconds:.1f} s")
    return visible("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", help="benchmarks, separated by commas")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there as JSON")
    parser.add_argument(
        "--sample-verdicts", action="store_true", help="compare the verdict on every sample, too"
    )
    programs = parser.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--no-code-execution", False, "leave benchmarks that run programs out"),
        ("--allow-code-execution", True, "run a results folder's programs in the sandbox"),
    ):
        programs.add_argument(
            flag, dest="run_code", action="store_const", const=value, default=None, help=text
        )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start = time.perf_counter()
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    try:
        comparison = rescore(
            given.folder,
            only,
            samples=given.sample_verdicts,
            run_code=given.run_code,
        )
    except UserError as error:
        parser.error(visible(str(error)))
    print(show(comparison, time.perf_counter() - start))
    rows = comparison.rows + comparison.sample_rows
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(bool(comparison.malformed) or not all(row["equal"] for row in rows))


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()), again="")
