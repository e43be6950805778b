"""Printed numbers (results/paper/*.csv), and which of our numbers each belongs to.

Those of the paper, and those that other papers and model cards print for the models of our other
experiments. Of the latter, the "table" is the experiment and the "size" is "-".
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.errors import UserError, did_you_mean
from proxytune.files import shipped

FOLDER = shipped("results/paper")

# Our (task, metric) -> the metric's name in results/paper. The pocket family's tasks (pocket_gsm8k)
# fill the same rows of a table, without a number of the paper beside them.
KEYS = {
    ("alpaca_eval", "win_rate"): "alpacafarm_win_rate",
    ("gsm8k", "acc"): "gsm_acc",
    ("toxigen", "toxicity"): "toxigen_toxic",
    ("truthfulqa_mc", "acc_valid"): "truthfulqa_mc_acc",
    ("truthfulqa_open", "info_true"): "truthfulqa_info_true",
    ("truthfulqa_open", "info"): "truthfulqa_info",
    ("truthfulqa_open", "true"): "truthfulqa_true",
    ("humaneval", "pass@10"): "humaneval_pass@10",
    ("ds1000", "pass@10"): "ds1000_pass@10",
    ("triviaqa", "em"): "triviaqa_em",
    ("realtimeqa", "acc"): "realtimeqa_acc",
    # Benchmarks of lm-eval, for which other papers print numbers of our experiments' models.
    ("lm_eval_aime24", "exact_match"): "aime24",
    ("lm_eval_aime25", "exact_match"): "aime25",
    ("lm_eval_math500_verify", "math_verify"): "math500",
    ("lm_eval_gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"): "gpqa_diamond",
}
# Of the pocket family's options few systems name one, so all of its questions count.
_POCKET_KEYS = {
    (task, "acc" if metric == "acc_valid" else metric): key for (task, metric), key in KEYS.items()
}
POCKET = "pocket_"
POCKET_SIZE = "pocket"
SIZES = ("13B", "70B")

# table that compares systems -> its metrics, in the paper's order
TABLES = {
    "2": (
        "alpacafarm_win_rate",
        "gsm_acc",
        "toxigen_toxic",
        "truthfulqa_mc_acc",
        "truthfulqa_info_true",
    ),
    "3": ("truthfulqa_info", "truthfulqa_true"),
    "4": ("humaneval_pass@10", "ds1000_pass@10"),
    "5": ("triviaqa_em", "gsm_acc"),
    "7": ("realtimeqa_acc",),
    "15": ("triviaqa_em", "gsm_acc"),
}
# table of a run -> the tables that print the paper's numbers for it, where these are several
_ALSO = {"2": ("2", "3"), "15": ("15", "5")}
# (table, size) of a run -> the tables that its numbers fill; "" stands for every other size
_FILLS = {
    ("2", ""): ("2", "3"),
    ("2", POCKET_SIZE): ("2", "3", "4"),
    ("5", ""): ("5", "15"),  # except for the tuned model: Table 15's is tuned with LoRA
}
# the models and the data of the paper's trainings (Table 14)
_SIZE_OF = {f"meta-llama/Llama-2-{size.lower()}-hf": size for size in ("7B", "13B", "70B")}
_BASE_OF = {size: model for model, size in _SIZE_OF.items()}
_TRAINED_ON = {"gsm8k": "gsm", "triviaqa": "triviaqa"}
_LOWER_IS_BETTER = ("toxigen_toxic",)
# (table, size) -> the average gap closed that the paper states, in percent
AVERAGE_GAP_CLOSED = {
    ("2", "13B"): 91.1,
    ("2", "70B"): 88.1,
    ("5", "13B"): 84.0,
    ("5", "70B"): 86.9,
}


def key_of(task: str, metric: str) -> str | None:
    """The metric's name in results/paper; None for a metric that the paper does not have."""
    keys = _POCKET_KEYS if task.startswith(POCKET) else KEYS
    return keys.get((task.removeprefix(POCKET), metric))


@cache
def numbers() -> pd.DataFrame:
    """The paper's printed numbers, and those of its authors' published runs that differ from them.

    Returns:
        Columns table, size, system, metric, value (in percent, in seconds for Table 12) and source
        ("paper" or "published", the latter for Figure 2 and three cells of tables).
    """
    return _read("tables.csv")


@cache
def published() -> pd.DataFrame:
    """The metrics of the authors' published run files, in the columns of `numbers`."""
    return _read("published.csv")


@cache
def elsewhere() -> pd.DataFrame:
    """Numbers that others have printed for single models.

    Returns:
        The columns of `numbers`, then model, document, and the setting they were measured in.
    """
    return _read("printed_elsewhere.csv")


def is_elsewhere(table: str) -> bool:
    """Whether the printed numbers of a table are not the paper's."""
    return bool((elsewhere()["table"] == table).any())


def check_place(table: str, size: str) -> None:
    """Refuses a table or a size that nobody has printed numbers for.

    Args:
        table, size: as in `cell`.

    Raises:
        UserError: there is none; the names of those that there are.
    """
    printed: Any = elsewhere() if is_elsewhere(table) else numbers()
    tables = [*TABLES, *dict.fromkeys(elsewhere()["table"])]
    if table not in tables:
        raise UserError(
            f"unknown paper.table={table}{did_you_mean(table, tables)}; known: {', '.join(tables)}"
        )
    sizes = [*dict.fromkeys(printed[printed["table"] == table]["size"])]
    sizes += [] if is_elsewhere(table) else [POCKET_SIZE]
    if size not in sizes:
        raise UserError(
            f"paper.table={table} has no paper.size={size}; known: {', '.join(sizes)}; "
            "paper=null shows no printed numbers"
        )


def sources(table: str, cells: Collection[tuple[str, str | None]]) -> list[str]:
    """Who printed the numbers that are not the paper's, and how they were measured.

    Args:
        table: the experiment.
        cells: (system, the metric's name from `key_of`) of each number that is shown.
    """
    rows: Any = elsewhere()[elsewhere()["table"] == table]
    metrics: dict[tuple[str, ...], list[str]] = {}
    for row in rows.to_dict("records"):
        if (row["system"], row["metric"]) in cells:
            keys = tuple(str(row[name]) for name in ("system", "model", "document", "setting"))
            metrics.setdefault(keys, []).append(row["metric"])
    return [
        f"{system} ({model}), {', '.join(names)}: {document}; {setting}"
        for (system, model, document, setting), names in metrics.items()
    ]


def models_of(table: str, size: str) -> dict[str, str]:
    """System -> the model whose numbers are printed, as far as it is known.

    Args:
        table, size: as in `cell`.
    """
    if is_elsewhere(table):
        printed = elsewhere()[elsewhere()["table"] == table]
        return dict(zip(printed["system"], printed["model"], strict=True))
    return {"base": _BASE_OF[size]} if size in _BASE_OF else {}


def same_model(one: str, other: str) -> bool:
    """Whether two models have the same name: hub ids, or folders that are named like them."""
    return Path(one).name.lower() == Path(other).name.lower()


def cell(
    table: str, size: str, system: str, key: str | None, source: str = "paper"
) -> float | None:
    """One number of the paper, or of its authors' published runs, for one of our systems.

    Args:
        table: "2", ...; the runs of a table may fill others ("2" also fills Table 3). Or an
            experiment of `elsewhere`.
        size: "13B", "70B", or "-" for Table 7 and for `elsewhere`.
        system: base, expert, antiexpert, proxy, tuned.
        key: the metric's name, from `key_of`.
        source: "paper" or "published".

    Returns:
        The value in the paper's unit; None where it has no such cell.
    """
    rows = published()
    if source == "paper":
        rows = elsewhere() if is_elsewhere(table) else numbers()
    rows = rows[(rows["metric"] == key) & (rows["source"] == source)]
    for number in _ALSO.get(table, (table,)):
        row_size, row_system = _row_of(number, size, system)
        found = rows[
            (rows["table"] == number) & (rows["size"] == row_size) & (rows["system"] == row_system)
        ]
        if len(found):
            return float(found["value"].tolist()[0])
    return None


def tables_filled_by(table: str, size: str) -> tuple[str, ...]:
    """The tables of `TABLES` that the runs of one table fill.

    The pocket family's main run has a code task, too, and so fills Table 4.
    """
    return _FILLS.get((table, size)) or _FILLS.get((table, "")) or (table,)


def training_hours(model: str, method: str, data: str) -> float | None:
    """The paper's training time (Table 14); None where it has none."""
    size, name = _SIZE_OF.get(model), _TRAINED_ON.get(data)
    return cell("14", size, method, f"{name}_train_hours") if size and name else None


def lower_is_better(key: str | None) -> bool:
    """Whether a metric of the paper counts harm."""
    return key in _LOWER_IS_BETTER


def _row_of(table: str, size: str, system: str) -> tuple[str, str]:
    """A system's size and name in a table of the paper: our expert is its tuned 7B model."""
    if table == "7" and size == "-":
        names = {
            "base": "gpt-3.5 base",
            "proxy": "gpt-3.5 proxy",
            "expert": "llama2-7b tuned",
            "antiexpert": "llama2-7b base",
        }
        return "-", names.get(system, system)
    if system == "expert" and size in SIZES:
        return "7B", "tuned"
    if table == "15" and system == "tuned":
        return size, "lora"
    return size, system


def _read(name: str) -> pd.DataFrame:
    path = Path(FOLDER, name)
    if not path.is_file():
        raise UserError(f"{path} is missing; it is part of the repository")
    return pd.read_csv(path, dtype={"table": str, "size": str})
