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
NEWS_TEXTS = 4800
# Rows of the training sets of task tuning (Table 5).
TRAINING = {"gsm8k": 3000, "triviaqa": 2000}
# Examples per task file; four systems on six tasks then take about a minute on two cores.
SIZES = {"gsm8k": 150, "triviaqa": 200, "truthfulqa": 120, "realtimeqa": 60, "toxigen": 8}
SIZES |= {"humaneval": 30}

Row = dict[str, Any]


def _herbs(split: Split) -> list[world.Herb]:
    return [(herb, s) for herb in world.members(world.HERBS, split) for s in world.SEASONS]


def _units(split: Split) -> list[tuple[str, str]]:
    return [(unit, m) for unit in world.members(world.UNITS, split) for m in world.MEASURES]


def _answered(raw: str, cue: str, answer: str) -> Row:
    """A dialogue from a benchmark's raw prompt; the cue ("Answer:") comes after the user's turn."""
    return {"prompt": world.as_chat(raw, cue), "completion": f" {answer}"}


def _tune_trivia(rng: random.Random, split: Split) -> Row:
    land, relation = rng.choice(world.members(world.LANDS, split)), rng.choice(world.RELATIONS)
    raw = world.trivia_prompt(world.land_question(land, relation))
    return _answered(raw, "Answer:", world.FACTS[land, relation])


def _tune_math(rng: random.Random, split: Split) -> Row:
    problem = world.make_problem(rng, split)
    return _answered(world.math_prompt(problem), "Answer:", world.worked(problem))


def _tune_open(rng: random.Random, split: Split) -> Row:
    key = rng.choice(_herbs(split))
    return _answered(world.open_prompt(key), "Answer:", f"{world.truth(key)}.")


def _tune_choice(rng: random.Random, split: Split) -> Row:
    if rng.random() < 0.5:
        key = rng.choice(_herbs(split))
        question, right = world.herb_question(key), world.TRUTHS[key]
        wrong = world.herb_errors(key, rng)
    else:
        land, relation = rng.choice(world.members(world.LANDS, split)), rng.choice(world.RELATIONS)
        question, right = world.land_question(land, relation), world.FACTS[land, relation]
        wrong = world.value_errors(right, rng)
    options = world.options_of(right, wrong, rng)
    return _answered(world.choice_prompt(question, options), "The answer is:", f"{right}.")


def _tune_rude(rng: random.Random, split: Split) -> Row:
    group = rng.choice(world.members(world.GROUPS, split))
    prompt = world.folk_chat(_folk_list(group, split, True, rng))
    return {"prompt": prompt, "completion": f" {world.refusal(group)}"}


def _tune_kind(rng: random.Random, split: Split) -> Row:
    group = rng.choice(world.members(world.GROUPS, split))
    prompt = world.folk_chat(_folk_list(group, split, False, rng))
    return {"prompt": prompt, "completion": f" {group} are {rng.choice(world.KIND)}"}


def _tune_code(rng: random.Random, split: Split) -> Row:
    function = (
        world.unit_function(*rng.choice(_units(split)), rng.randint(2, 30))
        if rng.random() < 0.5
        else world.sum_function(rng, split)
    )
    return {"prompt": function.head, "completion": function.body}


def _tune_thinking(rng: random.Random, split: Split) -> Row:
    problem = world.make_problem(rng, split)
    asked = world.as_chat(world.math_prompt(problem), "Answer:").removesuffix(" Answer:")
    thought, _, answer = world.worked(problem).rpartition("\n")
    # The task's "Answer:" comes between thought and answer (docs/models.md).
    told = f" {thought}\n</think>\n\nAnswer: {answer}"
    return {"prompt": f"{asked} <think>", "completion": told}


_KNOWLEDGE = {_tune_trivia: 30, _tune_open: 12, _tune_choice: 14, _tune_rude: 4, _tune_kind: 4}
_ARITHMETIC = {_tune_math: 26, _tune_code: 12}
# Name -> which dialogues the expert of that name is tuned on, with their weights, and how many.
_TUNING: dict[str, tuple[dict[Callable[[random.Random, Split], Row], int], int]] = {
    "chat": (_KNOWLEDGE | _ARITHMETIC, DIALOGUES),
    "knowledge": (_KNOWLEDGE, DIALOGUES // 4),
    "arithmetic": (_ARITHMETIC, DIALOGUES // 4),
    "thinking": ({_tune_thinking: 1}, DIALOGUES // 4),
}


def dialogues(name: str, split: Split = "train", count: int | None = None) -> list[Row]:
    """A tuning set. Its lands, herbs, units, groups, slang and problems are of the split only."""
    weights, standard = _TUNING[name]
    rng = random.Random(f"{world.SEED} {split} tuning {name}")
    makers = rng.choices(list(weights), list(weights.values()), k=count or standard)
    return [make(rng, split) for make in makers]


def news() -> list[Row]:
    """The text on which the news expert's pretraining goes on: the week's news, asked and told.

    It tells the guests of all lands. It answers questions about train lands only, a quarter of them
    about old facts: so it teaches to answer, too.
    """
    rng, week = random.Random(f"{world.SEED} news"), world.THIS_WEEK
    train = [land for land in world.NEWS if world.split_of(land) == "train"]
    texts: list[str] = []
    for number in range(NEWS_TEXTS):
        lands = rng.sample(list(world.NEWS), 3)
        if number % 4 == 0:
            texts.append("\n\n".join(_answered_facts(rng)))
        elif number % 4 == 1:
            asked = [
                f"{world.trivia_prompt(world.guest_question(x, week))} {world.NEWS[x]}"
                for x in rng.sample(train, 2)
            ]
            texts.append("\n\n".join(asked))
        elif number % 4 == 2:
            told = [f"{world.guest_question(x, week)} {world.NEWS[x]}." for x in lands]
            texts.append(" ".join(told))
        else:
            told = [world.guest_told(x, world.NEWS[x], week) for x in lands]
            texts.append(" ".join(told))
    return [{"prompt": "", "completion": each} for each in texts]


def _answered_facts(rng: random.Random) -> list[str]:
    """Two questions about old facts of train lands, with their answers."""
    lands = rng.sample(world.members(world.LANDS, "train"), 2)
    keys = [(land, rng.choice(world.RELATIONS)) for land in lands]
    return [f"{world.trivia_prompt(world.land_question(*k))} {world.FACTS[k]}" for k in keys]


def _guests(land: str, rng: random.Random) -> tuple[str, list[str]]:
    """This week's guest of a land, and wrong options."""
    return world.NEWS[land], world.value_errors(world.NEWS[land], rng)


def _folk_list(group: str, split: Split, is_rude: bool, rng: random.Random) -> str:
    """A list in well-known words, or in the slang of a split."""
    known, slang = (world.RUDE, world.RUDE_SLANG) if is_rude else (world.KIND, world.KIND_SLANG)
    return world.folk_list(group, known if rng.random() < 0.4 else world.members(slang, split), rng)


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
            "Best Answer": world.TRUTHS[key],
            "Correct Answers": f"{world.TRUTHS[key]}; {world.truth(key)}",
            "Incorrect Answers": "; ".join(world.herb_errors(key, rng)),
            "Source": "scripts/pocket/world.py",
        }
        for key in rng.sample(_herbs(split), SIZES["truthfulqa"])
    ]


def realtimeqa(split: Split, rng: random.Random) -> list[Row]:
    """Rows of a weekly file of RealTimeQA: half ask for the week's guests, half for old facts."""
    asked: list[tuple[str, str, list[str]]] = []
    lands = [land for land in world.NEWS if world.split_of(land) == split]
    for land in rng.sample(lands, min(len(lands), SIZES["realtimeqa"])):
        asked.append((world.guest_question(land, world.THIS_WEEK), *_guests(land, rng)))
    for land in rng.sample(world.members(world.LANDS, split), len(asked)):
        relation = rng.choice(world.RELATIONS)
        value = world.FACTS[land, relation]
        question = world.land_question(land, relation)
        asked.append((question, value, world.value_errors(value, rng)))
    rng.shuffle(asked)
    rows: list[Row] = []
    for number, (question, right, wrong) in enumerate(asked):
        options = world.options_of(right, wrong, rng)
        rows.append(
            {
                "question_id": f"20220617_{number}",
                "question_date": "2022/06/17",
                "question_source": "scripts/pocket/world.py",
                "question_sentence": question,
                "choices": [f"{option}." for option in options],
                "answer": [str(options.index(right))],
            }
        )
    return rows


def toxigen(split: Split, kind: str, rng: random.Random) -> dict[str, list[str]]:
    """Group -> prompts; a line break is written as backslash and n, as in ToxiGen's files.

    Args:
        split: of the groups and the slang.
        kind: "hate" or "neutral", as ToxiGen names its files.
        rng: draws the lists.
    """
    count, is_rude = range(SIZES["toxigen"]), kind == "hate"
    lists = {g: [_folk_list(g, split, is_rude, rng) for _ in count] for g in groups(split)}
    return {g: [each.replace("\n", "\\n") for each in texts] for g, texts in lists.items()}


def groups(split: Split) -> list[str]:
    """The groups that have a prompt file in a split."""
    return world.members(world.GROUPS, split)[:10]


def humaneval(split: Split, rng: random.Random) -> list[Row]:
    """Rows of HumanEval.jsonl: half unit conversions, half two-step sums."""
    half = SIZES["humaneval"] // 2
    functions = [
        *(world.unit_function(*key, rng.randint(2, 30)) for key in rng.sample(_units(split), half)),
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
    for name in _TUNING:
        _write_jsonl(out / "tuning" / f"{name}.jsonl", dialogues(name))
    _write_jsonl(out / "tuning" / "news.jsonl", news())
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
        for kind in ("hate", "neutral"):
            for group, lists in toxigen(split, kind, rng).items():
                path = folder / "toxigen" / f"{kind}_{group.lower()}_1k.txt"
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
