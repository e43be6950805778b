"""AlpacaEval 2's length-controlled win rate: the win rate if both outputs were equally long.

A logistic model of the judge's preferences has a term for the difference in length, one for the
instruction's difficulty and one for the system; the win rate is predicted without the first
(Dubois et al. 2024). Formula and fit are the alpaca-eval package's. It needs one more file, the
package's df_gamed.csv (dataset tatsu-lab/alpaca_eval on the hub): each instruction's difficulty,
and the preferences on a verbose and a concise baseline, which regularise the fit. Columns: index
(of the instruction), preference, std_delta_len, instruction_difficulty, not_gamed_baseline.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from proxytune.errors import UserError, extra

_COLUMNS = (
    "index",
    "preference",
    "std_delta_len",
    "instruction_difficulty",
    "not_gamed_baseline",
)
_GLM = "length_controlled_v1"
_UNREADABLE = (pd.errors.ParserError, pd.errors.EmptyDataError)


def read_difficulty(path: str, setting: str) -> pd.DataFrame:
    """The rows of df_gamed.csv.

    Args:
        path: the file, gzipped or not.
        setting: the setting that gives it, for messages.

    Raises:
        UserError: the file cannot be read, or is another one.
    """
    try:
        found: Any = pd.read_csv(Path(path).expanduser())
    except (OSError, EOFError, UnicodeDecodeError, *_UNREADABLE) as error:
        raise UserError(
            f"{setting}={path} cannot be read ({error}); the length-controlled win rate needs"
            " df_gamed.csv of the dataset tatsu-lab/alpaca_eval"
        ) from error
    missing = [column for column in _COLUMNS if column not in found]
    if missing:
        raise UserError(
            f"{setting}={path} has no column {missing[0]!r}: it is not df_gamed.csv of the dataset"
            " tatsu-lab/alpaca_eval, which has the instructions' difficulty and the gamed baselines"
        )
    return found[list(_COLUMNS)]


def check_instructions(gamed: pd.DataFrame, count: int, setting: str) -> None:
    """Refuses instructions whose difficulty the file does not have.

    Raises:
        UserError: the message names the first one.
    """
    unknown = sorted(set(range(count)) - set(gamed["index"].tolist()))
    if unknown:
        raise UserError(
            f"{setting} has no difficulty for instruction {unknown[0]}; it belongs to AlpacaEval's"
            " 805 instructions in their order"
        )


def controlled(
    wins: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    indices: Sequence[int],
    gamed: pd.DataFrame,
) -> list[float | None]:
    """The predicted wins without a difference in length; their mean is the win rate.

    Args:
        wins: [example], 0 to 1; None for no verdict, which the fit leaves out.
        lengths: [example], characters of our answer and of the reference.
        indices: [example], the instruction's place in AlpacaEval.
        gamed: as `read_difficulty` returns it.

    Returns:
        [example]; None for all where too few answers have a verdict, or all lengths differ alike.
    """
    difficulty: Any = gamed.drop_duplicates("index").set_index("index")["instruction_difficulty"]
    delta: Any = pd.Series([theirs - ours for ours, theirs in lengths], dtype=float)
    if sum(win is not None for win in wins) < 2 or not delta.std() > 0:
        return [None] * len(wins)
    with extra("alpaca_eval", "the length-controlled win rate"):
        glm = _package()
    mine = pd.DataFrame(
        {
            "preference": pd.Series(wins, dtype=float),
            "index": list(indices),
            "std_delta_len": delta / delta.std(),
            "instruction_difficulty": [float(difficulty[index]) for index in indices],
            "not_gamed_baseline": True,
        }
    )
    settings = glm.GLM_INFO[_GLM]
    everything: Any = pd.concat([gamed, mine], axis=0)
    equal = mine.assign(std_delta_len=0)
    train, test = glm.make_dmatrix_for_model(everything, equal, formula=settings["formula"])
    ours = everything["not_gamed_baseline"].astype(bool)
    # half of the regularisation for each of the two gamed baselines
    weight = ours.astype(float) + settings["regularize_to_baseline_lambda"] * (~ours) / 2
    known = train["preference"].notna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of settings that the package passes
        model = glm.fit_LogisticRegressionCV(
            train[known],
            "preference",
            is_ytrue_proba=True,
            sample_weight=weight[known],
            **settings["kwargs"],
        )
    return [float(p) for p in model.predict_proba(test)[:, 1]]


def _package() -> Any:
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        from alpaca_eval.metrics import glm_winrate
    root.setLevel(level)  # importing the package lowers the level of every library's log
    return glm_winrate
