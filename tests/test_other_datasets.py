"""A table on another dataset than the paper's says so; all of this fails on 538a493."""

import csv
import json
import sys
from pathlib import Path

import pytest

from proxytune import cli
from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.records import Metric, MetricInfo
from proxytune.results import tables
from proxytune.results.comparison import caveat
from proxytune.results.folder import build_table, read_csv
from proxytune.results.report import write_report
from tasks.ds1000 import DS1000
from tasks.gsm8k import GSM8K
from tasks.realtimeqa import RealTimeQA
from tasks.toxigen import ToxiGen
from tasks.triviaqa import TriviaQA
from tasks.truthfulqa import TruthfulQAMC, TruthfulQAOpen
from tests.release import task_of

GOLDEN = Path(__file__).parent / "golden"
COLUMNS = ("Question", "Best Answer", "Incorrect Answers")


def truthful(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows([f"Question {i}?", f"Right {i}", "Wrong; False; Bad"] for i in range(count))
    return path


@pytest.mark.parametrize("count", [5, 790])
@pytest.mark.parametrize("kind", [TruthfulQAMC, TruthfulQAOpen])
def test_a_csv_of_another_size(tmp_path, kind, count):
    task = kind(path=str(truthful(tmp_path / "TruthfulQA.csv", count)))
    assert task.other_dataset(task.examples()) == f"{count} examples, the paper's has 817"


def test_a_csv_of_the_papers_size_with_other_questions(tmp_path):
    task = TruthfulQAMC(path=str(truthful(tmp_path / "TruthfulQA.csv", 817)))
    assert task.other_dataset(task.examples()) == "817 examples as the paper's, with other contents"
    of_hub = TruthfulQAMC()  # of the hub's copy we know the size alone
    assert of_hub.other_dataset(task.examples()) == ""


@pytest.mark.parametrize("kind", [TruthfulQAMC, GSM8K])
def test_a_row_without_a_question_is_refused_by_its_number(tmp_path, kind):
    """It asked "Question: None", or ended in a traceback."""
    whole = {"question": "q", "answer": "#### 1", "best_answer": "b", "incorrect_answers": ["c"]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (whole, whole | {"question": None})))
    with pytest.raises(UserError, match=r"rows\.jsonl: the 'question' of row 1 is None"):
        kind(path=str(file)).examples()


def test_data_of_ones_own_is_not_compared():
    path = str(GOLDEN / "gsm8k.jsonl")
    examples = GSM8K(path=path).examples()
    assert GSM8K(path=path).other_dataset(examples) == "2 examples, the paper's has 1,319"
    assert GSM8K(path=path, paper_dataset=False).other_dataset(examples) == ""


def test_every_task_knows_the_papers_size():
    sizes = {TriviaQA: 11313, DS1000: 200, RealTimeQA: 3531, ToxiGen: 2800}
    assert {kind: kind().edition().examples for kind in sizes} == sizes
    assert DS1000(subset=1000).edition().examples == 1000


FILES = [
    "gsm/llama2-13B/example_prompt.txt",
    "toxigen/llama2-13B/example_prompt.txt",
    "alpaca_farm/llama2-chat-13B/example_prompt.txt",
    "codex_humaneval/llama2-13B-t0.8/example_prompt.txt",
    "truthfulqa/llama2-13B/example_mc_prompt.txt",
    "truthfulqa/llama2-13B/example_open_prompt.txt",
]


@pytest.mark.parametrize("name", FILES)
def test_the_papers_data_are_known_again(shared, name):
    task = task_of(shared / "published" / name, shared)
    examples = task.examples()
    assert task.other_dataset(examples) == ""
    assert "other contents" in task.other_dataset([*examples[1:], examples[0]])


def test_other_prompts_of_the_same_data_are_the_same_data(shared):
    path = str(shared / "data" / "gsm8k" / "test.jsonl")
    task = GSM8K(path=path, instruction=False)
    assert task.other_dataset(task.examples()) == ""


SAID = "† not the paper's dataset, not comparable with its numbers ({})"


def test_the_table_says_so_beside_the_number_and_keeps_it(tmp_path):
    infos = {"truthfulqa_mc": {"acc": MetricInfo("accuracy")}}
    metrics = [Metric("truthfulqa_mc", "base", "acc", 0.5, 790, 790)]
    other = {"truthfulqa_mc": "790 examples, the paper's has 817"}
    table = build_table(tmp_path, metrics, infos, other_datasets=other)
    said = SAID.format("truthfulqa_mc: 790 examples, the paper's has 817")
    assert caveat(table) == caveat(read_csv(tmp_path / "table.csv")) == said
    page = (tmp_path / "table.md").read_text()
    assert said in page and "| truthfulqa_mc † |" in page
    assert "truthfulqa_mc †" in tables.to_html(table)
    more = [Metric("gsm8k", "base", "acc", 0.5, 9, 9)]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(vars(metrics[0])) + "\n")
    table = build_table(tmp_path, more, {"gsm8k": infos["truthfulqa_mc"]})
    assert caveat(table) == said and "| gsm8k |" in (tmp_path / "table.md").read_text()
    assert caveat(build_table(tmp_path, metrics, infos)) == ""


@pytest.mark.slow
def test_a_run_says_so_before_models_load_and_in_every_file(tmp_path, monkeypatch, capfd):
    path = truthful(tmp_path / "TruthfulQA.csv", 5)
    settings = ["task=truthfulqa_mc", f"task.truthfulqa_mc.path={path}", "systems=[expert]"]
    folder = tmp_path / "run"
    words = [*settings, "triple=pocket", "name=x", f"output_dir={folder}"]
    monkeypatch.setattr(sys, "argv", ["run.py", "experiment=none", *words])
    monkeypatch.chdir(ROOT)
    cli.run()
    said = "5 examples, the paper's has 817"
    assert json.loads((folder / "run.json").read_text())["other_datasets"] == {
        "truthfulqa_mc": said
    }
    assert SAID.format(f"truthfulqa_mc: {said}") in (folder / "table.md").read_text()
    assert "not the paper" in write_report(folder).read_text()
    assert "truthfulqa_mc" in capfd.readouterr().out
