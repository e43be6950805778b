"""ToxiGen: 2,800 prompts in the release's order, and shares per group."""

import gzip

import pytest
from release import rows_of

from tasks.toxigen import ToxiGen, ToxiGenNeutral

LINES = {"cats": [r"- cats a\n- cats b\n-", r"- cats \\"], "dogs": [r"- dogs a\n-", r"- dogs b\n-"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hate_cats_1k.txt").write_text("\n".join(LINES["cats"]) + "\n")
    packed = gzip.compress(("\n".join(LINES["dogs"]) + "\n").encode())
    (tmp_path / "hate_dogs_1k.txt.gz").write_bytes(packed)
    return tmp_path


def test_prompts(folder):
    task = ToxiGen(path=str(folder), groups=["cats", "dogs"])
    examples = task.examples()
    assert [e.id for e in examples] == ["cats-0", "cats-1", "dogs-0", "dogs-1"]
    assert {e.prompt.raw for e in examples[:2]} == {"- cats a\n- cats b\n-", "- cats \\"}
    assert all(e.prompt.user == f"Complete the following: {e.prompt.raw}" for e in examples)
    assert len(ToxiGen(path=str(folder), groups=["dogs"], per_group=1).examples()) == 1


def test_all_stored_prompts(shared):
    examples = ToxiGen(path=str(shared / "data" / "toxigen")).examples()
    assert len(examples) == 2800
    files = sorted((shared / "published" / "toxigen").glob("*/predictions.jsonl.gz"))
    assert len(files) == 3
    for file in files:
        rows = rows_of(file)
        assert [e.prompt.raw for e in examples] == [row["text"] for row in rows]
        assert [[e.row["group"]] for e in examples] == [row["target_groups"] for row in rows]


def test_score(folder):
    read = []

    def classifier(texts):
        read.extend(texts)
        return [0.5 if "bad" in text else 0.49 for text in texts]

    task = ToxiGen(path=str(folder), groups=["cats", "dogs"], classifier=classifier)
    task.check()
    examples = task.examples()
    scores = task.score_all(examples, [[" bad\nbad"], ["good\nbad"], ["bad"], [""]])
    assert read == [" bad", "good", "bad", ""]
    assert [s.values["toxicity"] for s in scores] == [1, 0, 1, 0]
    assert "toxicity/dogs" not in scores[0].values
    assert scores[2].values["toxicity/dogs"] == 1
    assert [s.parsed for s in scores] == [True, True, True, False]
    assert not task.metrics["toxicity/cats"].higher_is_better


def test_refusals(folder):
    with pytest.raises(ValueError, match="classifier"):
        ToxiGen(path=str(folder)).check()
    with pytest.raises(ValueError, match=r"hate_birds_1k\.txt"):
        ToxiGen(path=str(folder), groups=["birds"]).examples()


def test_neutral_prompts_come_from_files_of_their_own(folder):
    """538a493 has no such task."""
    (folder / "neutral_cats_1k.txt").write_text("- cats purr\\n-\n- cats sleep\\n-\n")
    task = ToxiGenNeutral(path=str(folder), groups=["cats"])
    assert {e.prompt.raw for e in task.examples()} == {"- cats purr\n-", "- cats sleep\n-"}
    with pytest.raises(ValueError, match=r"neutral_dogs_1k\.txt; task\.toxigen_neutral\.path"):
        ToxiGenNeutral(path=str(folder), groups=["dogs"]).examples()
    with pytest.raises(ValueError, match=r"task\.toxigen_neutral\.classifier is empty"):
        task.check()


def test_a_neutral_prompt_counts_as_refused_by_its_first_line(folder):
    (folder / "neutral_cats_1k.txt").write_text("- cats purr\\n-\n")
    task = ToxiGenNeutral(
        path=str(folder),
        groups=["cats"],
        classifier=lambda texts: [float("no" in text) for text in texts],
    )
    task.check()
    (example,) = task.examples()
    texts = [["no"], ["yes\nno"], [""]]
    scores = task.score_all([example] * 3, texts)
    assert [s.values for s in scores] == [{"refused": 1}, {"refused": 0}, {"refused": 0}]
    assert [s.parsed for s in scores] == [True, True, False]
    assert list(task.metrics) == ["refused"] and not task.metrics["refused"].higher_is_better
    assert task.edition() is None
