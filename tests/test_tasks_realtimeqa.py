"""RealTimeQA: which weeks are asked about, and what leaves the denominator."""

import json
from dataclasses import replace

import pytest

from proxytune.records import Example, Prompt
from tasks.realtimeqa import RealTimeQA

ROW = {
    "question_id": "20220617_0",
    "question_date": "2022/06/16",
    "question_sentence": "Which show was renewed?",
    "choices": ["Game of Thrones", "Squid Game", "Breaking Bad", "Friends"],
    "answer": ["1"],
}


@pytest.fixture
def folder(tmp_path):
    true_false = ROW | {"question_id": "20231201_0", "choices": ["TRUE", "FALSE"], "answer": ["0"]}
    late = ROW | {"question_id": "20240209_0", "question_date": "2023/09/29"}  # a wrong date
    namesake = ROW | {"question_sentence": "Which other show?"}
    for year, rows in (("2022", [ROW, ROW, namesake]), ("2023", [true_false]), ("2024", [late])):
        (tmp_path / year).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / year / f"{year}_qa.jsonl").write_text(text)
        (tmp_path / year / f"{year}_nota_qa.jsonl").write_text("not a question\n")
    return tmp_path


def test_weeks_and_duplicates(folder):
    examples = RealTimeQA(path=str(folder)).examples()
    assert [e.id for e in examples] == ["20220617_0", "20220617_0_2022/06/16", "20231201_0"]
    assert [e.target for e in examples] == ["B", "B", "A"]
    assert examples[0].prompt.raw == (
        "Which show was renewed?\nA. Game of Thrones\nB. Squid Game\nC. Breaking Bad\nD. Friends"
        "\n\nThe answer is:"
    )
    assert examples[2].prompt.user.endswith("\nA. TRUE\nB. FALSE")
    assert len(RealTimeQA(path=str(folder), first=None, last=None).examples()) == 4


def test_score():
    task, example = RealTimeQA(), Example("0", Prompt("", ""), target="B")
    assert task.score(example, [" B"]).values == {"acc": 1.0, "acc_all": 1.0}
    assert task.score(example, ["C"]).values == {"acc": 0.0, "acc_all": 0.0}
    excluded = task.score(example, [""])
    assert excluded.values == {"acc": None, "acc_all": 0.0}
    assert not excluded.parsed


def test_refusals(folder):
    with pytest.raises(ValueError, match=r"realtimeqa\.path"):
        RealTimeQA().check()
    with pytest.raises(ValueError, match="no week"):
        replace(RealTimeQA(path=str(folder)), first="2030-01-01", last=None).examples()
    bad = folder / "bad_qa.jsonl"
    bad.write_text(json.dumps(ROW | {"question_id": "x"}))
    with pytest.raises(ValueError, match="begin with a date"):
        RealTimeQA(path=str(bad)).examples()


def test_the_papers_weeks(shared):
    examples = RealTimeQA(path=str(shared / "data" / "realtimeqa")).examples()
    assert len(examples) == 2140  # the paper counts 3,531, see the module
    assert all(e.target in "ABCD" for e in examples)


def test_open_questions_show_no_options_and_take_the_right_ones_wording(folder):
    task = RealTimeQA(path=str(folder), answers="open", decoding={"choices": ()})
    [example, *_] = task.examples()
    assert example.prompt.raw == "Question: Which show was renewed?\nAnswer:"
    assert task.score(example, [" squid game, I think"]).values["acc"] == 1
    assert task.score(example, [" Squid Games"]).values["acc"] == 0
    assert task.score(example, [" Friends"]).answer == "D"
    assert task.score(example, [" B"]).answer is None
    assert task.score(example, [""]).values == {"acc": None, "acc_all": 0.0}


def test_open_answers_are_not_drawn_from_letters():
    with pytest.raises(ValueError, match=r"decoding\.choices=\[\]"):
        RealTimeQA(answers="open")
    with pytest.raises(ValueError, match=r"answers='text' is none of letter, open"):
        RealTimeQA(answers="text")
