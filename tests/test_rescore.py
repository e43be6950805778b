"""Scoring again: a release with known numbers, tampered, incomplete; a results folder of ours."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from proxytune.files import write_jsonl
from proxytune.records import Completion, Example, Metric, Prompt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from rescore import main, rescore, show  # noqa: E402

BY_LIBRARY = {"pandas_pass@10": 0.25, "scipy_pass@10": 1.0}
KEYS = ["benchmark", "system", "metric", "published", "ours", "equal"]


def put(folder: Path, name: str, content, *, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and ".jsonl" in name
    text = "".join(json.dumps(r) + "\n" for r in content) if lines else json.dumps(content)
    if zipped:
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)


@pytest.fixture
def release(tmp_path):
    gsm = [
        {"question": "q", "answer": "57", "model_output": "57.00", "prediction": "57.00"},
        {"question": "q", "answer": "-5", "model_output": "5", "prediction": "5"},
        {"question": "q", "answer": "3", "model_output": None, "prediction": ""},
        {"question": "q", "answer": "3", "model_output": "1 3.", "prediction": "3"},
    ]
    put(tmp_path / "maths" / "big-70B", "predictions.jsonl", gsm, zipped=True)
    put(tmp_path / "maths" / "big-70B", "metrics.json", {"exact_match": 0.5})
    tox = [
        {"text": "t", "target_groups": [g], "is_toxic": x, "prediction": "p"}
        for g, x in (("cats", 1), ("cats", 0), ("dogs", 0), ("dogs", 0))
    ]
    put(tmp_path / "tox" / "a", "predictions.jsonl", tox)
    put(tmp_path / "tox" / "a", "metrics.json", {"cats": 0.5, "dogs": 0.0, "overall": 0.25})
    mc = [
        {"mc_output": " A", "mc_answer_idx": "A", "parsed_output": "A"},
        {"mc_output": "?", "mc_answer_idx": "A", "parsed_output": ""},
        {"mc_output": "B", "mc_answer_idx": "A", "parsed_output": "B"},
    ]
    judged = [
        {"GPT-true": 0.5, "GPT-true acc": 1, "GPT-info": 0.4, "GPT-info acc": 0, "output": "o"},
        {"GPT-true": 0.9, "GPT-true acc": 1, "GPT-info": 0.6, "GPT-info acc": 1, "output": "o"},
    ]
    questions = tmp_path / "questions" / "b"
    put(questions, "mc_results.jsonl", mc)
    put(questions, "mc_metrics.json", {"acc": 0.5, "num_invalid_predictions": 1, "tot": 3})
    put(questions, "open_results.jsonl", judged, zipped=True)
    means = {"GPT-true": 0.7 + 4e-11, "GPT-info": 0.5}
    shares = {"GPT-true acc": 1.0, "GPT-info acc": 0.5, "GPT-true-info acc": 0.5}
    put(questions, "open_metrics.json", means | shares)
    pairs = [{"preference": p, "output_2": o} for p, o in ((2, "abc"), (1, "a"), (0, "ab"))]
    put(tmp_path / "farm" / "c", "annotations.json", pairs)
    farm = {"win_rate": 50.0, "standard_error": 28.867513459481287, "n_wins": 1, "n_wins_base": 1}
    farm |= {"n_draws": 1, "n_total": 3, "mode": "community", "avg_length": 2, "new_metric": 1}
    put(tmp_path / "farm" / "c", "metrics.json", farm)
    ds = [{"lib": lib, "output": [], "problem_id": 0} for lib in ("Pandas", "Pandas", "Scipy")]
    put(tmp_path / "ds" / "d", "predictions.jsonl", ds)
    put(tmp_path / "ds" / "d", "metrics.json", {"by_lib": BY_LIBRARY, "pass@10": 0.5})
    return tmp_path


def test_release(release):
    found = rescore(release, samples=True)
    assert all(list(row) == KEYS for row in found.rows)
    assert [r for r in found.rows + found.sample_rows if not r["equal"]] == []
    count = dict.fromkeys(("maths", "tox", "questions", "farm", "ds"), 0)
    for row in found.rows:
        count[str(row["benchmark"])] += 1
    assert count == {"maths": 1, "tox": 3, "questions": 8, "farm": 7, "ds": 1}
    assert len(found.sample_rows) == 4 + 3 + 2 * 2
    reasons = " ".join(reason for _, _, reason in found.skipped)
    assert "new_metric" in reasons
    assert "DS-1000 cannot be scored again" in reasons


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("maths/big-70B/metrics.json", {"exact_match": 0.5 + 1e-11}),
        ("tox/a/metrics.json", {"cats": 0.4999, "overall": 0.25}),
        ("questions/b/mc_metrics.json", {"acc": 1 / 3}),
        ("questions/b/open_metrics.json", {"GPT-true acc": 0.5}),
        ("questions/b/open_metrics.json", {"GPT-true": 0.7 + 1e-9}),
        ("farm/c/metrics.json", {"n_wins": 2}),
        ("ds/d/metrics.json", {"by_lib": BY_LIBRARY, "pass@10": 0.625}),
    ],
)
def test_a_difference_is_found(release, file, change, tmp_path, capsys):
    (release / file).write_text(json.dumps(change))
    out = tmp_path / "out" / "rows.json"
    assert main([str(release), "--json", str(out)]) == 1
    assert "NO" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["benchmark"] for row in rows if not row["equal"]] == [file.split("/")[0]]


def test_a_sample_that_differs_is_found(release):
    file = release / "questions" / "b" / "mc_results.jsonl"
    file.write_text(file.read_text().replace('"parsed_output": "B"', '"parsed_output": "A"'))
    found = rescore(release, ["questions"], samples=True)
    assert [row["metric"] for row in found.sample_rows if not row["equal"]] == ["parsed_output 2"]
    assert "parsed_output 2" in show(found, 0.0)


def test_what_is_missing_is_said(release):
    (release / "maths" / "big-70B" / "metrics.json").unlink()
    (release / "tox" / "a" / "predictions.jsonl").unlink()
    put(release / "new" / "e", "predictions.jsonl", [{"x": 1}])
    put(release / "new" / "e", "metrics.json", {"y": 1})
    put(release / "new" / "f", "predictions.jsonl", [])
    found = rescore(release)
    reasons = {(b, s): reason for b, s, reason in found.skipped}
    assert "no metrics.json" in reasons["maths", "big-70B"]
    assert "none of predictions.jsonl" in reasons["tox", "a"]
    assert "columns of no benchmark known here: x" in reasons["new", "e"]
    assert "is empty" in reasons["new", "f"]
    assert {row["benchmark"] for row in found.rows} == {"questions", "farm", "ds"}


def test_only(release, capsys):
    assert main([str(release), "--only", "maths, tox"]) == 0
    assert "4 of 4 metrics equal" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(release), "--only", "gsm"])
    assert "there is ds, farm, maths, questions, tox" in capsys.readouterr().err


def test_a_malformed_file_hides_no_other_run(release, capsys):
    (release / "maths" / "big-70B" / "predictions.jsonl.gz").write_bytes(b"no gzip")
    (release / "tox" / "a" / "metrics.json").write_text("[1]")
    assert main([str(release)]) == 1
    shown = capsys.readouterr().out
    assert "MALFORMED maths/big-70B: predictions.jsonl:" in shown
    assert "MALFORMED tox/a: predictions.jsonl:" in shown
    assert "questions" in shown and " NO" not in shown


def test_programs_are_left_out_on_request(release, capsys):
    put(release / "code" / "g", "predictions.jsonl", [{"task_id": "HumanEval/0", "completion": ""}])
    put(release / "code" / "g", "metrics.json", {"pass@1": 0.0})
    assert main([str(release), "--only", "code", "--no-code-execution"]) == 0
    assert "were not run" in capsys.readouterr().out


def test_one_benchmark_or_system_alone(release):
    assert len(rescore(release / "farm").rows) == 7
    assert len(rescore(release / "farm" / "c").rows) == 7


def test_nothing_to_score(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as status:
            main([str(folder)])
        assert status.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "run"
    tasks = {
        "gsm8k": {"_target_": "tasks.gsm8k.GSM8K", "path": None, "decoding": {}},
        "mine": {"_target_": "tasks.toxigen.ToxiGen"},  # no conf/task/mine.yaml has a classifier
    }
    put(folder, "run.json", {"tasks": tasks})
    prompt = Prompt("", "")
    for name in tasks:
        row = {"group": "asian"} if name == "mine" else {}
        examples = [Example(str(i), prompt, target="7", row=row) for i in range(3)]
        write_jsonl(folder / name / "examples.jsonl", examples)
    done = [
        Completion(str(i), 0, text, text, [], "eos") for i, text in enumerate(("7", "7.00", "8"))
    ]
    write_jsonl(folder / "gsm8k" / "proxy" / "completions.jsonl", done)
    write_jsonl(folder / "gsm8k" / "base" / "completions.jsonl", done[:2])
    write_jsonl(folder / "mine" / "base" / "completions.jsonl", done)
    stored = [
        Metric("gsm8k", "proxy", "acc", 1 / 3, 3, 3),
        Metric("gsm8k", "proxy", "acc_numeric", 2 / 3, 3, 3),
        Metric("gsm8k", "base", "acc", 1.0, 2, 3),
    ]
    write_jsonl(folder / "metrics.jsonl", stored)
    return folder


def test_results_folder(results):
    found = rescore(results, ["gsm8k"])
    rows = {(r["system"], r["metric"]): (r["published"], r["ours"], r["equal"]) for r in found.rows}
    assert rows == {
        ("base", "acc"): (1.0, 0.5, False),
        ("proxy", "acc"): (1 / 3, 1 / 3, True),
        ("proxy", "acc_numeric"): (2 / 3, 2 / 3, True),
    }
    assert any("1 of 3 examples lack samples" in reason for _, _, reason in found.skipped)
    assert any("no acc_numeric" in reason for _, _, reason in found.skipped)


def test_a_judge_that_is_missing_skips_its_task(results):
    (results / "gsm8k" / "base" / "completions.jsonl").unlink()
    found = rescore(results)
    assert all(row["equal"] for row in found.rows)
    assert any("classifier" in reason for _, _, reason in found.skipped)


@pytest.mark.slow
def test_the_papers_release(shared):
    only = ["gsm", "truthfulqa", "toxigen", "alpaca_farm", "ds1000"]
    found = rescore(shared / "published", only)
    assert [row for row in found.rows if not row["equal"]] == []
    assert len(found.rows) == 111


@pytest.mark.slow
def test_humaneval_of_the_release(shared, tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/rescore.py", str(shared / "published" / "codex_humaneval")]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=False)
    assert done.returncode == 0
    rows = json.loads(out.read_text())
    assert [r["ours"] for r in rows if r["metric"] == "sample_verdicts"] == [3280] * 4
