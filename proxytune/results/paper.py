"""The paper's numbers (results/paper/*.csv) and where they belong among ours."""

from functools import cache
from pathlib import Path

import pandas as pd

from proxytune.errors import UserError
from proxytune.files import shipped

FOLDER = shipped("results/paper")

# (task, metric) of ours -> the metric's name in results/paper; the pocket family's tasks have the
# shapes of the paper's and fill the same rows of a table, beside no number of the paper.
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
}
POCKET = "pocket_"
POCKET_SIZE = "pocket"
SIZES = ("13B", "70B")

# what each table of results shows, in the paper's order
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
# where a table's runs find the paper's numbers
_ALSO = {"2": ("2", "3"), "15": ("15", "5")}
_FILLS = {
    ("2", ""): ("2", "3"),
    ("2", POCKET_SIZE): ("2", "3", "4"),
    ("5", ""): ("5", "15"),  # but for the tuned model, which Table 15 tunes with LoRA
}
# what the paper trained (Table 14)
_SIZE_OF = {f"meta-llama/Llama-2-{size.lower()}-hf": size for size in ("7B", "13B", "70B")}
_BASE_OF = {size: model for model, size in _SIZE_OF.items()}
_TRAINED_ON = {"gsm8k": "gsm", "triviaqa": "triviaqa"}
_LOWER_IS_BETTER = ("toxigen_toxic",)
# the average gap closed that the paper states, in percent: table, size -> value
AVERAGE_GAP_CLOSED = {
    ("2", "13B"): 91.1,
    ("2", "70B"): 88.1,
    ("5", "13B"): 84.0,
    ("5", "70B"): 86.9,
}


def key_of(task: str, metric: str) -> str | None:
    """The metric's name in results/paper; None for a metric that the paper does not have."""
    return KEYS.get((task.removeprefix(POCKET), metric))


@cache
def numbers() -> pd.DataFrame:
    """The paper's tables and the published runs' exceptions: table, size, system, metric, value.

    Values are in percent (seconds in Table 12); `source` is "paper" or "published".
    """
    return _read("tables.csv")


@cache
def published() -> pd.DataFrame:
    """The metrics of the authors' published run files, in the columns of `numbers`."""
    return _read("published.csv")


def cell(
    table: str, size: str, system: str, key: str | None, source: str = "paper"
) -> float | None:
    """One number of the paper, or of its authors' published runs, for one of our systems.

    Args:
        table: "2", ...; the runs of a table may fill others ("2" also fills Table 3).
        size: "13B", "70B", or "-" for Table 7.
        system: base, expert, antiexpert, proxy, tuned.
        key: the metric's name, from `key_of`.
        source: "paper" or "published".

    Returns:
        The value in the paper's unit; None where it has no such cell.
    """
    rows = numbers() if source == "paper" else published()
    rows = rows[(rows["metric"] == key) & (rows["source"] == source)]
    for number in _ALSO.get(table, (table,)):
        row_size, row_system = _row_of(number, size, system)
        found = rows[
            (rows["table"] == number) & (rows["size"] == row_size) & (rows["system"] == row_system)
        ]
        if len(found):
            return float(found["value"].tolist()[0])
    return None


def other_base(size: str, model: str) -> str | None:
    """The base behind the paper's numbers of a size, where `model` is another one; else None.

    Args:
        size: as in `cell`.
        model: a hub id, or a folder that is named like it.
    """
    theirs = _BASE_OF.get(size)
    same = theirs is None or Path(model).name.lower() == Path(theirs).name.lower()
    return None if same else theirs


def tables_filled_by(table: str, size: str) -> tuple[str, ...]:
    """The tables of `TABLES` that the runs of one table fill.

    The pocket family's main run has tasks of every shape, code among them.
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
    """How the paper's tables name a system: the expert is the tuned 7B row."""
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
