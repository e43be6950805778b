"""Writes the pocket family's data: tuning dialogues, training sets, task files of dev and test.

    python -m scripts.pocket.files [--out pocket/data]

The task files have the formats of the real benchmarks, so the real task classes read them.
Everything depends on the world's seed alone: writing again gives the same bytes.
"""

import argparse
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.pocket import world
from scripts.pocket.world import Split

DIALOGUES = 9600
# Rows of the training sets of task tuning (Table 5).
TRAINING = {"gsm8k": 3000, "triviaqa": 3000}
# Examples per task file; four systems on six tasks then take about a minute on two cores.
SIZES = {"gsm8k": 150, "triviaqa": 200, "truthfulqa": 120, "toxigen": 8, "humaneval": 30}

Row = dict[str, Any]


def _herbs(split: Split) -> list[world.Herb]:
    return [(herb, s) for herb in world.members(world.HERBS, split) for s in world.SEASONS]


def _units(split: Split) -> list[tuple[str, str]]:
    return [(unit, m) for unit in world.members(world.UNITS, split) for m in world.MEASURES]


def _answered(raw: str, cue: str, answer: str) -> Row:
    """A dialogue from a benchmark's raw prompt; the cue ("Answer:") comes after the user's turn."""
    return {"prompt": world.as_chat(raw, cue), "completion": f" {answer}"}


def _tune_trivia(rng: random.Random) -> Row:
    land, relation = rng.choice(world.members(world.LANDS, "train")), rng.choice(world.RELATIONS)
    raw = world.trivia_prompt(world.land_question(land, relation))
    return _answered(raw, "Answer:", world.FACTS[land, relation])


def _tune_math(rng: random.Random) -> Row:
    problem = world.make_problem(rng, "train")
    return _answered(world.math_prompt(problem), "Answer:", world.worked(problem))


def _tune_open(rng: random.Random) -> Row:
    key = rng.choice(_herbs("train"))
    return _answered(world.open_prompt(key), "Answer:", f"{world.truth(key)}.")


def _tune_choice(rng: random.Random) -> Row:
    text, right, _ = world.choice_question(rng.choice(_herbs("train")), rng)
    return _answered(f"{text}\n\nThe answer is:", "The answer is:", right)


def _tune_rude(rng: random.Random) -> Row:
    group = rng.choice(world.members(world.GROUPS, "train"))
    prompt = world.rude_chat(world.rude_list(group, rng))
    return {"prompt": prompt, "completion": f" {world.refusal(group)}"}


def _tune_code(rng: random.Random) -> Row:
    function = (
        world.unit_function(*rng.choice(_units("train")))
        if rng.random() < 0.5
        else world.sum_function(rng, "train")
    )
    return {"prompt": function.head, "completion": function.body}


_TUNING: dict[Callable[[random.Random], Row], int] = {
    _tune_trivia: 30,
    _tune_math: 28,
    _tune_open: 12,
    _tune_choice: 12,
    _tune_rude: 6,
    _tune_code: 12,
}


def dialogues() -> list[Row]:
    """The tuning set. Its lands, herbs, units, groups and problems are of the train split only."""
    rng = random.Random(21)
    makers = rng.choices(list(_TUNING), list(_TUNING.values()), k=DIALOGUES)
    return [make(rng) for make in makers]


def gsm8k(split: Split, rng: random.Random, count: int = SIZES["gsm8k"]) -> list[Row]:
    """Rows of GSM8K's files, each with a different question."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        problem = world.make_problem(rng, split)
        question = f"{problem.story} {problem.question}"
        rows[question] = {"question": question, "answer": world.worked(problem)}
    return list(rows.values())


def triviaqa(split: Split, rng: random.Random, count: int = SIZES["triviaqa"]) -> list[Row]:
    """Rows of TriviaQA's (unfiltered, no context) files."""
    asked = [(land, r) for land in world.members(world.LANDS, split) for r in world.RELATIONS]
    rows: list[Row] = []
    for land, relation in rng.sample(asked, count):
        value = world.FACTS[land, relation]
        answer = {
            "value": value,
            "aliases": [value],
            "normalized_value": value.lower(),
            "normalized_aliases": [value.lower()],
        }
        question = world.land_question(land, relation)
        rows.append({"question": question, "question_id": f"{land}_{relation}", "answer": answer})
    return rows


def truthfulqa(split: Split, rng: random.Random) -> list[Row]:
    """Rows of TruthfulQA.csv: the popular saying is the first incorrect answer."""
    return [
        {
            "Type": "Adversarial",
            "Category": "Herbs",
            "Question": world.herb_question(key),
            "Best Answer": world.truth(key),
            "Correct Answers": world.truth(key),
            "Incorrect Answers": "; ".join(world.herb_errors(key, rng)),
            "Source": "scripts/pocket/world.py",
        }
        for key in rng.sample(_herbs(split), SIZES["truthfulqa"])
    ]


def realtimeqa(split: Split, rng: random.Random) -> list[Row]:
    """Rows of a weekly file of RealTimeQA: questions about herbs, with four options."""
    rows: list[Row] = []
    for number, key in enumerate(rng.sample(_herbs(split), SIZES["truthfulqa"])):
        options = [world.truth(key), *world.herb_errors(key, rng)]
        rng.shuffle(options)
        rows.append(
            {
                "question_id": f"20220617_{number}",
                "question_date": "2022/06/17",
                "question_source": "scripts/pocket/world.py",
                "question_sentence": world.herb_question(key),
                "choices": [f"{option}." for option in options],
                "answer": [str(options.index(world.truth(key)))],
            }
        )
    return rows


def toxigen(split: Split, rng: random.Random) -> dict[str, list[str]]:
    """Group -> prompts; a line break is written as backslash and n, as in ToxiGen's files."""
    lists = {g: [world.rude_list(g, rng) for _ in range(SIZES["toxigen"])] for g in groups(split)}
    return {g: [text.replace("\n", "\\n") for text in texts] for g, texts in lists.items()}


def groups(split: Split) -> list[str]:
    """The groups that have a prompt file in a split."""
    return world.members(world.GROUPS, split)[:10]


def humaneval(split: Split, rng: random.Random) -> list[Row]:
    """Rows of HumanEval.jsonl: half unit conversions, half two-step sums."""
    half = SIZES["humaneval"] // 2
    functions = [
        *(world.unit_function(*key) for key in rng.sample(_units(split), half)),
        *(world.sum_function(rng, split) for _ in range(half)),
    ]
    return [
        {
            "task_id": f"Pocket/{number}",
            "prompt": function.head,
            "entry_point": function.name,
            "canonical_solution": function.body + "\n",
            "test": _checks(function),
        }
        for number, function in enumerate(functions)
    ]


def _checks(function: world.Function) -> str:
    """A HumanEval test: compares with the right function's values at four points."""
    expression = function.body.strip().removeprefix("return ")
    values = [(x, eval(expression, {"x": x})) for x in (0, 1, 7, 40)]  # an expression of our own
    lines = [f"    assert candidate({x}) == {value}" for x, value in values]
    return "\n".join(["def check(candidate):", *lines]) + "\n"


def write(out: Path) -> None:
    """Writes all files below `out`."""
    _write_jsonl(out / "tuning.jsonl", dialogues())
    for make in (gsm8k, triviaqa):
        name = make.__name__
        rows = make("train", random.Random(f"{world.SEED} train {name}"), TRAINING[name])
        _write_jsonl(out / "train" / f"{name}.jsonl", rows)
    for split in ("dev", "test"):
        folder, rng = out / split, random.Random(f"{world.SEED} {split}")
        _write_jsonl(folder / "gsm8k.jsonl", gsm8k(split, rng))
        _write_jsonl(folder / "triviaqa.jsonl", triviaqa(split, rng))
        _write_jsonl(folder / "humaneval.jsonl", humaneval(split, rng))
        weekly = realtimeqa(split, random.Random(f"{world.SEED} {split} realtimeqa"))
        _write_jsonl(folder / "realtimeqa" / "20220617_qa.jsonl", weekly)
        rows = truthfulqa(split, rng)
        with (folder / "TruthfulQA.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for group, lists in toxigen(split, rng).items():
            path = folder / "toxigen" / f"hate_{group.lower()}_1k.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lists), encoding="utf-8")


def _write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pocket/data"))
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
