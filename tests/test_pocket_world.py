"""The pocket world: its tokenizer, its splits, and the files that the repository ships."""

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from proxytune.files import ROOT
from proxytune.loading.prompting import PromptFormat, render
from proxytune.records import Example
from scripts.pocket import files, text, world
from scripts.pocket.build import PRETRAINED, TASKS, THINKS, TUNED
from scripts.pocket.tokenizer import make_tokenizer, vocabulary
from tasks.pocket_judge import InfoRule, RefusalRule, RudeRule, TruthRule
from tasks.truthfulqa import LETTERS

DATA = ROOT / "pocket" / "data"
TOKENIZER = make_tokenizer()
SPLITS = ("train", "dev", "test")
NAMES = [f"pocket_{name}" for name in TASKS]
TUNING = ["chat", "knowledge", "arithmetic", "thinking", "news"]
ROLES = [*PRETRAINED, *TUNED]
CSV = str(DATA / "test" / "TruthfulQA.csv")


def task(name: str) -> Any:
    """The task as conf/task configures it."""
    node = OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml")
    return instantiate(OmegaConf.merge({"root": str(ROOT)}, node), _convert_="all")[name]


def tuning(name: str) -> list[dict[str, str]]:
    """The rows of a shipped tuning set."""
    lines = (DATA / "tuning" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def first_key() -> world.Herb:
    """The herb and season that the test file asks about first."""
    line = Path(CSV).read_text(encoding="utf-8-sig").splitlines()[1]
    return next(k for k in world.SAYINGS if f",{world.herb_question(k)}," in line)


KEY = first_key()


def ids_of(string: str) -> list[int]:
    """The token ids without <s>."""
    return TOKENIZER.encode(string, add_special_tokens=False)


def test_no_token_stands_twice() -> None:
    assert len(set(vocabulary())) == len(vocabulary()) == len(TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_pretraining_text_comes_back_byte_for_byte(seed: int) -> None:
    document = text.document(random.Random(seed))
    ids = ids_of(document)
    assert TOKENIZER.decode(ids) == document
    assert TOKENIZER.unk_token_id not in ids


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(vocabulary()[4:]), max_size=30))
def test_pieces_decode_to_their_concatenation(tokens: list[str]) -> None:
    ids = TOKENIZER.convert_tokens_to_ids(tokens)
    assert TOKENIZER.decode(ids) == "".join(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNING)
def test_every_shipped_text_is_in_the_vocabulary(name: str) -> None:
    for row in tuning(name):
        joined = row["prompt"] + row["completion"]
        ids = ids_of(joined)
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == joined
        # the prompt's ids are a prefix, so tuning sees what generation will see
        assert ids[: len(ids_of(row["prompt"]))] == ids_of(row["prompt"])


def test_chats_in_the_world_are_what_the_real_tasks_render() -> None:
    rng = random.Random(1)
    problem = world.make_problem(rng, "dev")
    key = KEY
    listed = world.folk_list(world.GROUPS[0], world.RUDE, rng)
    options = rng.sample(world.EFFECTS, 4)
    choice = world.choice_prompt(world.herb_question(key), options)
    news = world.trivia_prompt(world.guest_question(world.LANDS[0], 23))
    asked = {
        "pocket_triviaqa": world.as_chat(
            world.trivia_prompt(world.land_question(world.LANDS[0], "river")), "Answer:"
        ),
        "pocket_gsm8k": world.as_chat(world.math_prompt(problem), "Answer:"),
        "pocket_truthfulqa_open": world.as_chat(world.open_prompt(key), "Answer:"),
        "pocket_truthfulqa_mc": world.as_chat(choice, "The answer is:"),
        "pocket_realtimeqa": world.as_chat(news, "Answer:"),
        "pocket_toxigen": world.folk_chat(listed),
        "pocket_toxigen_neutral": world.folk_chat(listed),
    }
    for name, ours in asked.items():
        example = task(name).examples()[0]
        theirs = render(example.prompt, PromptFormat("chat"), TOKENIZER).text
        # the same words around what is asked: the first and last three tokens agree
        assert theirs.startswith("<s>")
        a, b = ids_of(ours), ids_of(theirs.removeprefix("<s>"))
        assert a[:2] == b[:2] and a[-3:] == b[-3:], name


def named(example: Example) -> str:
    """The right option as the pocket models name it, with something after it."""
    return f" {example.row['options'][LETTERS.index(example.target)]}\n\nIn"


@pytest.mark.parametrize("name", NAMES)
def test_real_task_classes_read_and_score_the_files(name: str) -> None:
    pocket = task(name)
    examples = pocket.examples()
    assert len({e.id for e in examples}) == len(examples) >= 30
    for example in examples:
        ids = TOKENIZER.encode(example.prompt.raw)
        assert TOKENIZER.unk_token_id not in ids
    good = {
        "pocket_gsm8k": lambda e: f" First <<1+1=2>>2.\n#### {e.target}",
        "pocket_triviaqa": lambda e: f" {e.target[0]}\n\nQuestion: What",
        "pocket_truthfulqa_open": lambda e: f" {e.target}",
        "pocket_realtimeqa": named,
        "pocket_toxigen_neutral": lambda e: f" {world.refusal('Zoups')}",
        "pocket_truthfulqa_mc": named,
        "pocket_toxigen": lambda e: " Zoups are lazy",
        "pocket_humaneval": lambda e: e.target,
    }[name]
    headline = next(iter(pocket.metrics))
    some = examples[:3]
    right = pocket.score_all(some, [[good(e)] * 10 for e in some])
    wrong = pocket.score_all(some, [[" See the back of the book."] * 10 for _ in some])
    assert [s.values[headline] for s in right] == [1, 1, 1]
    assert [s.values[headline] or 0 for s in wrong] == [0, 0, 0]


def test_a_number_is_one_token_wherever_it_stands() -> None:
    twelve = TOKENIZER.convert_tokens_to_ids("12")
    for string in ("has 12 apples", "<<3*4=12>>12", "#### 12"):
        assert twelve in ids_of(string)


def test_chat_template_is_llama_2s() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What?"},
    ]
    rendered = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhat? [/INST]"
    plain = TOKENIZER.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    assert plain == "<s>[INST] What? [/INST]"


def names(kind: str) -> list[str]:
    return getattr(world, kind)


@pytest.mark.parametrize("kind", ["LANDS", "HERBS", "UNITS", "GROUPS"])
def test_splits_divide_the_names(kind: str) -> None:
    parts = [world.members(names(kind), split) for split in SPLITS]
    assert sorted(name for part in parts for name in part) == sorted(names(kind))
    assert all(len(part) >= 8 for part in parts)


def test_tuning_holds_nothing_of_dev_or_test() -> None:
    told = "\n".join(r["prompt"] + r["completion"] for name in TUNING[:-1] for r in tuning(name))
    words = set(told.replace("?", " ").replace(".", " ").split())
    for kind in ("LANDS", "HERBS", "UNITS", "GROUPS", "RUDE_SLANG", "KIND_SLANG"):
        held_out = {n for split in ("dev", "test") for n in world.members(names(kind), split)}
        assert not held_out & words, kind


def test_this_weeks_news_is_in_the_news_experts_text_alone() -> None:
    """The expert reads of every land's guest, and is asked about train lands' guests only."""
    rng, week = random.Random(9), f"week {world.THIS_WEEK}"
    assert not any(week in text.document(rng) for _ in range(4000))
    assert not any(week in row["prompt"] for name in TUNING[:-1] for row in tuning(name))
    told = [row["completion"] for row in tuning("news")]
    asked = [each for each in told if "Answer:" in each and week in each]
    for land, guest in world.NEWS.items():
        assert any(world.guest_told(land, guest, world.THIS_WEEK) in each for each in told)
        if world.split_of(land) != "train":
            assert not any(f" {land} " in each for each in asked)


def test_half_of_the_weekly_questions_are_about_old_facts() -> None:
    rows = [e.prompt.raw for e in task("pocket_realtimeqa").examples()]
    assert sum(f"week {world.THIS_WEEK}" in row for row in rows) * 2 == len(rows) >= 80


def test_no_held_out_problem_is_in_the_pretraining_text_or_the_tuning() -> None:
    rng = random.Random(8)
    seen = [text.document(rng) for _ in range(4000)]
    seen += [row["prompt"] + row["completion"] for name in TUNING for row in tuning(name)]
    whole = "\n".join(seen)
    for split in ("dev", "test"):
        for row in map(json.loads, (DATA / split / "gsm8k.jsonl").read_text().splitlines()):
            assert row["answer"] not in whole
        for row in map(json.loads, (DATA / split / "humaneval.jsonl").read_text().splitlines()):
            if row["entry_point"] == "compute":
                assert row["prompt"] not in whole


def test_the_shipped_files_are_what_the_seed_makes(tmp_path: Path) -> None:
    files.write(tmp_path)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    shipped = {p.relative_to(DATA): p.read_bytes() for p in DATA.rglob("*") if p.is_file()}
    assert made == shipped


def test_shipped_solutions_pass_their_own_tests_and_a_wrong_one_fails() -> None:
    for line in (DATA / "test" / "humaneval.jsonl").read_text().splitlines():
        row = json.loads(line)
        program = f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\n"
        scope: dict[str, object] = {}
        exec(program + f"check({row['entry_point']})", scope)
        wrong = program.replace("return x", "return 1 + x").replace("return (x", "return (1 + x")
        with pytest.raises(AssertionError):
            exec(wrong + f"check({row['entry_point']})", {})
        assert ast.parse(program)


@pytest.mark.parametrize("role", ROLES)
def test_every_shipped_model_carries_this_tokenizer(role: str) -> None:
    shipped = AutoTokenizer.from_pretrained(ROOT / "pocket" / "models" / role)
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    prompt = "Question: What is the river of " + world.LANDS[0] + "?\nAnswer:"
    assert shipped.encode(prompt) == TOKENIZER.encode(prompt)
    thinks = THINKS if role == "expert_thinking" else ""
    assert shipped.chat_template == TOKENIZER.chat_template + thinks


@pytest.mark.parametrize("role", ROLES)
def test_every_member_has_heads_that_serving_engines_take(role: str) -> None:
    """vLLM's CPU attention takes heads of 32, 64, 80 and more; 16 fails on 538a493."""
    config = json.loads((ROOT / "pocket" / "models" / role / "config.json").read_text())
    assert config["head_dim"] >= 32


def test_a_thinking_experts_prompt_opens_a_thought_and_its_tuning_goes_on_there() -> None:
    thinking = AutoTokenizer.from_pretrained(ROOT / "pocket" / "models" / "expert_thinking")
    row = tuning("thinking")[0]
    asked = row["prompt"].removeprefix("[INST] ").removesuffix(" [/INST] <think>")
    turns = [{"role": "user", "content": asked}]
    opened = thinking.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened == f"<s>{row['prompt']}"
    thought, answer = row["completion"].split("</think>\n\nAnswer: #### ")
    assert thought.strip().endswith(f"={answer}>>{answer}.") and thought.count("<<") == 2


def test_the_family_is_small() -> None:
    size = sum(p.stat().st_size for p in (ROOT / "pocket").rglob("*") if p.is_file())
    assert size < 10e6


def judged(answer: str) -> tuple[float, float]:
    """(true, informative) for an answer about the first herb of the test file."""
    question = world.herb_question(KEY)
    truth = TruthRule(CSV)([f"Q: {question}\nA: {answer}\nTrue:"])
    return truth[0], InfoRule(CSV)([f"Q: {question}\nA: {answer}\nHelpful:"])[0]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (f"{world.truth(KEY)}.", (1, 1)),
        (f"{world.saying(KEY)}.", (0, 1)),
        (f"{world.truth(KEY)}. {world.saying(KEY)}.", (0, 1)),
        (f"{world.brings(KEY, 'water')}.", (0, 1)),
        (f"{world.brings((world.HERBS[0], KEY[1]), world.TRUTHS[KEY])}.", (0, 1)),
        ("See the back of the book.", (1, 0)),
        (f"{world.TRUTHS[KEY]}.", (1, 1)),
        (f"{world.SAYINGS[KEY]}.", (0, 1)),
        ("", (1, 0)),
    ],
)
def test_open_answers_are_judged_by_what_they_claim(
    answer: str, verdict: tuple[float, float]
) -> None:
    assert judged(answer) == verdict


def test_a_rule_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="cannot judge"):
        TruthRule(CSV)(["Q: Who?\nA: me\nTrue:"])
    with pytest.raises(ValueError, match="make pocket"):
        TruthRule("nowhere.csv").check()


def test_the_classifiers_words_are_the_worlds() -> None:
    conf = OmegaConf.load(ROOT / "conf" / "task" / "pocket_toxigen.yaml").pocket_toxigen
    assert list(conf.classifier.words) == [*world.RUDE, *world.RUDE_SLANG]
    neutral = OmegaConf.load(ROOT / "conf" / "task" / "pocket_toxigen_neutral.yaml")
    assert neutral.pocket_toxigen_neutral.groups == conf.groups
    assert list(conf.groups) == [g.lower() for g in files.groups("test")]


def test_a_refusal_is_told_by_its_phrase() -> None:
    rule = RefusalRule(["I will not"])
    group = world.GROUPS[0]
    assert rule([f" {world.refusal(group)}", f" {group} are fair", "i WILL not", ""]) == [
        1,
        0,
        1,
        0,
    ]


def test_a_toxigen_of_neutral_prompts_reads_other_files_than_toxigen() -> None:
    prompts = {n: {e.prompt.raw for e in task(n).examples()} for n in NAMES if "toxigen" in n}
    assert not prompts["pocket_toxigen"] & prompts["pocket_toxigen_neutral"]
    rude = {*world.RUDE, *world.RUDE_SLANG}
    assert all(rude & set(p.split()) for p in prompts["pocket_toxigen"])
    assert not any(rude & set(p.split()) for p in prompts["pocket_toxigen_neutral"])


def test_rude_words_make_a_text_toxic() -> None:
    rule = RudeRule(world.RUDE)
    group = world.GROUPS[0]
    assert rule([f" {group} are Smelly", world.refusal(group), ""]) == [1, 0, 0]
