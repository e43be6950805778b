"""TriviaQA: exact match with the answer or an alias."""

import json

import pytest

from tasks.triviaqa import TriviaQA, answers, normalize

ROWS = [
    {
        "question": "Who was the man behind The Chipmunks?",
        "question_id": "tc_2",
        "answer": {"value": "David Seville", "aliases": ["David Seville", "Ross Bagdasarian"]},
    },
    {
        "question": "Which Lloyd Webber musical premiered in the US on 10th December 1993?",
        "question_id": "tc_33",
        "answer": {
            "value": "Sunset Boulevard",
            "aliases": ["Sunset Blvd", "West Sunset Boulevard"],
        },
    },
]


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "dev.jsonl"
    # rc.nocontext repeats a question for each of its documents
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    return TriviaQA(path=str(file))


def test_prompt_and_ids(task):
    examples = task.examples()
    assert [e.id for e in examples] == ["tc_2", "tc_33"]
    prompt = examples[0].prompt
    assert prompt.raw == "Question: Who was the man behind The Chipmunks?\nAnswer:"
    assert (prompt.user, prompt.response_prefix) == (prompt.raw.split("\n")[0], "Answer:")


def test_references_and_every_alias_are_right(task):
    for example, row in zip(task.examples(), ROWS, strict=True):
        for alias in (row["answer"]["value"], *row["answer"]["aliases"]):
            for text in (alias, f" {alias.upper()} ", f"{alias}\n\nQuestion: more"):
                assert task.score(example, [text]).values == {"em": 1.0, "em_normalized": 1.0}


@pytest.mark.parametrize(
    ("text", "em", "normalized"),
    [("the sunset boulevard.", 0, 1), ("Sunset", 0, 0), ("", 0, 0), ("Sunset Boulevard\nx", 0, 0)],
)
def test_metrics(task, text, em, normalized):
    score = task.score(task.examples()[1], [text])
    assert score.values == {"em": em, "em_normalized": normalized}
    assert score.parsed == bool(text)


@pytest.mark.parametrize("quote", "'’‘´`")
def test_all_quotation_marks_are_alike(tmp_path, quote):
    """Fails on 538a493: the dataset's own evaluation replaces all five."""
    file = tmp_path / "dev.jsonl"
    answer = {"value": "Sophie's Choice", "aliases": ["Rosemary’s ‘Baby’"]}
    file.write_text(json.dumps({"question": "q", "answer": answer}))
    task = TriviaQA(path=str(file))
    for text in (
        f"sophie{quote}s choice",
        f"Rosemary{quote}s Baby",
        f"{quote}Sophie s Choice{quote}",
    ):
        assert task.score(task.examples()[0], [text]).values["em_normalized"] == 1


@pytest.mark.parametrize(
    ("text", "aliases", "right"),
    [
        ("", ["A", "?"], 0),  # these five fail on 538a493
        ("the", ["A"], 0),
        (".", ["!", "?"], 0),
        (" \n", ["an"], 0),
        ("", [" ", "x"], 0),
        ("‘’", ["The The"], 0),
        ("a", ["A"], 1),
        ("The The", ["The The"], 1),
        ("B", ["A"], 0),
    ],
)
def test_an_empty_answer_never_matches(tmp_path, text, aliases, right):
    file = tmp_path / "dev.jsonl"
    row = {"question": "q", "answer": {"value": aliases[0], "aliases": aliases}}
    file.write_text(json.dumps(row))
    task = TriviaQA(path=str(file))
    score = task.score(task.examples()[0], [text])
    assert score.values == {"em": right, "em_normalized": right}


def test_answers():
    assert answers({"question": "q", "answer": "a", "aliases": ["b", "a"]}) == ["a", "b"]
    assert answers({"question": "q", "answer": {"value": "a", "aliases": None}}) == ["a"]
    for answer, said in (
        ({"value": None, "aliases": []}, "no answer"),
        ({"value": "<unk>", "aliases": []}, "no answer"),
        (["a", "b"], r"it must be a text, or \{"),
        ({"value": 5}, "it must be a text"),
        ({"value": "a", "aliases": "Paris"}, "it must be a text"),
        ("{'value': 'a', 'aliases': ['b']}", "JSON Lines"),  # pandas' CSV: nothing matched it
    ):
        with pytest.raises(ValueError, match=said):
            answers({"question": "q", "answer": answer})


def test_normalize():
    assert normalize("The  Beatles' (band)") == "beatles band"
