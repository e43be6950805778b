"""AlpacaEval: instructions, and what becomes of a judge's verdicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tasks.alpaca_eval import AlpacaEval, AlpacaEval2, win_of

FILE = str(Path(__file__).parent / "golden" / "alpaca_eval.json")


class Judge:
    def __init__(self, verdicts):
        self.verdicts = verdicts

    def annotate(self, examples, texts):
        assert len(examples) == len(texts)
        self.texts = texts
        return self.verdicts


def test_score():
    judge = Judge([1.0, None])
    task = AlpacaEval(path=FILE, judge=judge)
    task.check()
    examples = task.examples()
    assert examples[0].target.startswith("Some famous actors")
    scores = task.score_all(examples, [["  abc\n"], ["defg"]])
    assert judge.texts == ["abc", "defg"]
    assert [s.values for s in scores] == [
        {"win_rate": 1.0, "avg_length": 3.0},
        {"win_rate": None, "avg_length": 4.0},
    ]
    assert [s.parsed for s in scores] == [True, False]


def test_a_judge_that_loses_an_example_is_an_error():
    task = AlpacaEval(path=FILE, judge=Judge([1.0]))
    with pytest.raises(ValueError, match="zip"):
        task.score_all(task.examples(), [["a"], ["b"]])


def test_preferences():
    assert [win_of(p) for p in (2, 1, 0, 1.5, 1.25)] == [1, 0, 0.5, 0.5, 0.25]
    for wrong in (-1, 3, float("nan")):
        with pytest.raises(ValueError, match="preference"):
            win_of(wrong)


def test_refuses_without_judge():
    with pytest.raises(ValueError, match=r"alpaca_eval\.judge"):
        AlpacaEval(path=FILE).check()


def test_all_instructions(shared):
    file = shared / "data" / "alpaca_eval" / "text_davinci_003_model_outputs.json.gz"
    assert len(AlpacaEval(path=str(file)).examples()) == 805


@pytest.fixture
def alpaca2(tmp_path):
    """A task of 60 instructions, whose longer answers win more often."""
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"do {i}", "output": "x" * int(rng.integers(20, 90))} for i in range(60)
    ]
    (tmp_path / "baseline.json").write_text(json.dumps(rows))
    difficulty = rng.normal(size=60)
    gamed = [
        {
            "model": f"gamed_{way}",
            "index": i,
            "preference": float(np.clip(0.5 + way * 0.2 + rng.normal(0, 0.1), 0.01, 0.99)),
            "std_delta_len": float(-way + rng.normal(0, 0.1)),
            "instruction_difficulty": difficulty[i],
            "not_gamed_baseline": False,
        }
        for way in (1, -1)
        for i in range(60)
    ]
    pd.DataFrame(gamed).to_csv(tmp_path / "df_gamed.csv", index=False)
    texts = [["y" * int(rng.integers(20, 120))] for _ in range(60)]
    longer = [len(t[0]) - len(r["output"]) for t, r in zip(texts, rows, strict=True)]
    wins: list[float | None] = [0.5 + 0.4 * float(np.tanh(d / 30)) for d in longer]
    wins[7] = None
    paths: dict[str, Any] = {
        "path": str(tmp_path / "baseline.json"),
        "difficulty": str(tmp_path / "df_gamed.csv"),
    }
    return AlpacaEval2(judge=Judge(wins), **paths), texts


@pytest.mark.slow
def test_the_length_controlled_win_rate_is_the_packages(alpaca2, monkeypatch):
    """538a493 has none."""
    from alpaca_eval.metrics import glm_winrate

    task, texts = alpaca2
    examples = task.examples()
    scores = task.score_all(examples, texts)
    annotations = pd.DataFrame(
        {
            "preference": [w if w is None else 1 + w for w in task.judge.verdicts],
            "output_1": [e.target for e in examples],
            "output_2": [t[0] for t in texts],
            "generator_1": "baseline",
            "generator_2": "ours",
            "annotator": "a",
        }
    )
    annotations["preference"] = annotations["preference"].astype(float)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: task.difficulty)
    theirs = glm_winrate.get_length_controlled_winrate(annotations, save_weights_dir=None)
    values = [s.values["lc_win_rate"] for s in scores]
    assert 100 * np.mean(values) == pytest.approx(theirs["length_controlled_winrate"], abs=1e-9)
    raw = [s.values["win_rate"] for s in scores if s.values["win_rate"] is not None]
    assert 100 * np.mean(raw) == pytest.approx(theirs["win_rate"], abs=1e-9)
    assert 0 < np.mean(values) < np.mean(raw)  # the wins came by length


def test_without_its_file_the_length_controlled_win_rate_is_refused(alpaca2, tmp_path):
    task, _ = alpaca2
    with pytest.raises(ValueError, match=r"task\.alpaca_eval2\.difficulty is empty.*df_gamed"):
        AlpacaEval2(path=task.path, judge=task.judge).check()
    other = tmp_path / "instruction_difficulty.csv"
    other.write_text(",instruction_difficulty\n0,1.5\n")
    with pytest.raises(ValueError, match=r"no column 'index': it is not df_gamed"):
        AlpacaEval2(path=task.path, judge=task.judge, difficulty=str(other)).check()
    with pytest.raises(ValueError, match=r"none\.csv cannot be read"):
        AlpacaEval2(path=task.path, judge=task.judge, difficulty="none.csv").check()
    few = pd.read_csv(task.difficulty).query("index < 50")
    few.to_csv(other, index=False)
    with pytest.raises(ValueError, match="no difficulty for instruction 50"):
        AlpacaEval2(path=task.path, judge=task.judge, difficulty=str(other)).examples()


def test_one_answer_has_no_length_controlled_win_rate(alpaca2):
    task, texts = alpaca2
    task.judge.verdicts = [1.0]
    assert task.score(task.examples()[0], texts[0]).values["lc_win_rate"] is None
