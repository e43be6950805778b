"""Members that think: the thought is kept out of stops, scores and choices. All fail on 538a493."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import proxytune
from proxytune import cli
from proxytune.engine.text import GrowingText
from proxytune.engine.thought import thought_of
from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptFormat, render, thinking
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import check_thinks
from proxytune.records import Decoding, Prompt
from tests.commands import call
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

FORMAT = PromptFormat(kind="chat", think_end="</think>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}<think>\n{% endif %}{% endif %}"
)


def special_tokenizer():
    """Tags that are single special tokens, which decoding drops."""
    tokenizer = tiny_tokenizer(vocab=298)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


# -- text --------------------

TEXTS = [  # written, whether the prompt opens the thought, the answer
    ("<think>I\nQuestion: x</think>\n\nIt is 4.\nQuestion: y", False, "It is 4."),
    ("I\nQuestion: x</think>It is 4.\nQuestion: y", True, "It is 4."),
    ("\n<think></think> 7", False, "7"),
    ("no thought 1 < 2\nQuestion: y", False, "no thought 1 < 2"),
    ("<thin ice\nQuestion: y", False, "<thin ice"),
    ("<thi", False, "<thi"),
    ("<think>never ended\nQuestion: x", False, ""),
    ("never ended\nQuestion: x", True, ""),
    ("<think>a</thi</think>b", False, "b"),
    ("<think>a</think>  \n", False, ""),
    ("", False, ""),
]


@pytest.mark.parametrize(("written", "opened", "answer"), TEXTS)
@pytest.mark.parametrize("make", [tiny_tokenizer, special_tokenizer])
def test_the_answer_of_a_text(written, opened, answer, make):
    tokenizer = make()
    thought = thought_of("<think>", "</think>", tokenizer, opened=opened, prefix="", word=None)
    text = GrowingText(tokenizer, [1], ("\nQuestion:",), thought)
    pieces = [text.push(token) for token in tokenizer(written, add_special_tokens=False).input_ids]
    pieces.append(text.finish())
    assert (text.text, "".join(pieces)) == (answer, answer)
    assert text.raw == written


# -- prompts --------------------


def test_a_response_prefix_comes_after_the_thought():
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    prompt = Prompt(raw="Q: 1?\nAnswer:", user="Q: 1?", response_prefix="Answer:")
    plain = PromptFormat(kind="chat")
    assert render(prompt, plain, tokenizer).text.endswith("<|assistant|> Answer:")
    assert render(prompt, FORMAT, tokenizer).text.endswith("<|assistant|>")
    opening = PromptFormat(kind="chat", think_end="</think>", template_kwargs={"think": True})
    assert render(prompt, opening, tokenizer).text.endswith("<think>\n")
    assert render(prompt, PromptFormat(think_end="</think>"), tokenizer).text == "Q: 1?"
    # a template that closes the thought leaves none to wait for
    tokenizer.chat_template = TEMPLATE.replace("<think>\n", "<think>\n\n</think>\n\n")
    assert render(prompt, opening, tokenizer).text.endswith("</think>\n\nAnswer:")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"think_end": ""}, "think_end is a tag"),
        ({"think_end": "<end>"}, "give format.think_start"),
        ({"think_start": "<think>"}, "needs format.think_end"),
        ({"think_end": "/"}, "give format.think_start"),
    ],
)
def test_tags_that_cannot_be(settings, said):
    with pytest.raises(UserError, match=said):
        PromptFormat(**settings)


def test_members_share_one_thought():
    other = PromptFormat(think_end="[/THINK]")
    assert other.tags == ("[THINK]", "[/THINK]")
    with pytest.raises(UserError, match="expert and antiexpert end their thoughts"):
        thinking({"base": PromptFormat(), "expert": FORMAT, "antiexpert": other})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"think_budget": 0}, "think_budget must be a whole number of at least 1"),
        ({"think_budget": 512}, "leaves no room for an answer"),
        ({"think_budget": 5, "think_least": 6}, "think_least=6 is more than think_budget=5"),
        ({"think_word": ""}, "think_word must be a word"),
    ],
)
def test_budgets_that_cannot_be(settings, said):
    with pytest.raises(UserError, match=said):
        Decoding(**settings)


# -- decoding --------------------


def triple(end: str, start: str | None = None, tokenizer=None) -> proxytune.Generator:
    """Random models; the expert's thoughts end with `end`."""
    tokenizer = tokenizer or tiny_tokenizer()
    fmt = PromptFormat(think_end=end, think_start=start)
    models = {
        role: LoadedModel(tiny_model(seed=seed, scale=4.0), tokenizer)
        for seed, role in enumerate(("base", "expert", "antiexpert"))
    }
    models["expert"].spec = ModelSpec("x", format=fmt)
    return proxytune.load(**models)


PROMPTS = ["One <think>", "Two clips <think>\n", "Three", "Question: What is 4? <think>"]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"think_budget": 7}, marks=pytest.mark.slow),
        {"think_budget": 9, "choices": ["a", "b"]},
        {"think_budget": 12, "think_least": 8, "think_word": "W", "stop": [" "]},
        pytest.param(
            {"banned_first": ["a", "e", "t"], "stop": ["a"], "repetition_penalty": 1.3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_thoughts_do_not_depend_on_batch_or_drafts(how, temperature):
    generator = triple("e", "<think>")
    settings = {"max_new_tokens": 30, "temperature": temperature, "n": 2, **how}
    prefixes = ["Answer:", "", "Answer:", ""]
    want = generator.generate(
        PROMPTS, batch_size=1, speculative=False, prefixes=prefixes, **settings
    )
    for speculative, batch_size in ((False, 8), (1, 8), (4, 3), (4, 1), ("auto", 2)):
        got = generator.generate(
            PROMPTS,
            batch_size=batch_size,
            speculative=speculative,
            prefixes=prefixes,
            **settings,
        )
        assert got == want


@pytest.mark.thinned(1)
@pytest.mark.parametrize("make", [tiny_tokenizer, special_tokenizer])
def test_a_budget_ends_a_thought_and_the_prefix_follows(make):
    tokenizer = make()
    generator = triple("</think>", tokenizer=tokenizer)
    (found,) = generator.generate(
        ["One <think>"], max_new_tokens=60, think_budget=10, prefixes=["Answer:"], ignore_eos=True
    )
    closing = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    after = tokenizer("\n\nAnswer:", add_special_tokens=False)["input_ids"]
    assert found.token_ids[10 : 10 + len(closing) + len(after)] == closing + after
    assert found.extra["thought"] == {"tokens": 10 + len(closing), "end": "budget"}
    thought, _, answer = found.raw_text.partition("</think>\n\nAnswer:")
    assert thought and found.text == answer
    assert len(found.token_ids) == 60


@pytest.mark.slow
def test_a_word_replaces_an_early_end():
    generator = triple("q", "<think>")
    asked = {"max_new_tokens": 60, "temperature": 3.0, "n": 20, "ignore_eos": True}
    free = generator.generate(PROMPTS[:1], **asked)
    held = generator.generate(PROMPTS[:1], think_least=40, think_word="W", **asked)
    ended = [each.extra["thought"]["tokens"] < 40 for each in free]
    assert any(ended) and not all(ended)
    for early, before, after in zip(ended, free, held, strict=True):
        assert after.extra["thought"]["tokens"] > 40
        assert ("W" in after.raw_text) >= early
        if early:
            cut = before.extra["thought"]["tokens"] - 1
            assert after.token_ids[:cut] == before.token_ids[:cut]
    with pytest.raises(UserError, match="tokens"):
        generator.generate(PROMPTS[:1], think_least=4, think_word="Wait!", max_new_tokens=9)


def test_a_helper_of_another_vocabulary_does_not_think():
    for kind in ("strict", "special"):
        check_thinks(kind, ["expert"])
    check_thinks("map", ["base"])
    with pytest.raises(UserError, match=r"expert: format\.think_end does not go with"):
        check_thinks("map", ["base", "expert"])


def test_a_word_of_several_tokens_is_refused_before_a_model_is_loaded(tmp_path):
    done = call(
        cli.run,
        *("triple=pocket_thinking", "task=[pocket_gsm8k]", "systems=[base,proxy]", "report=false"),
        *("decoding.think_least=10", "decoding.think_word='two words here'", "limit=1"),
        f"output_dir={tmp_path / 'x'}",
    )
    assert done.returncode == 1 and "'two words here' is 3 tokens" in done.stderr
    assert "loading" not in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("system", "warns"), [("base", True), ("expert", False)])
def test_a_budget_without_a_model_that_thinks_is_said_to_change_nothing(system, warns, tmp_path):
    done = call(
        cli.run,
        *("triple=pocket_thinking", "task=[pocket_gsm8k]", f"systems=[{system}]", "report=false"),
        *("decoding.think_budget=5", "limit=1", "stage=generate", f"output_dir={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    said = "decoding.think_budget changes nothing: no model of systems=[base] thinks"
    assert (said in done.stderr) == warns


@pytest.mark.parametrize(("end", "warns"), [("</think>", False), ("</thnik>", True)])
def test_an_end_of_thoughts_that_the_model_does_not_know_is_named(end, warns, tmp_path):
    """A misspelt one would score thoughts as answers."""
    done = call(
        cli.run,
        *("triple=pocket_thinking", "task=[pocket_gsm8k]", "systems=[expert]", "report=false"),
        *(f'triple.expert.format.think_end="{end}"', "limit=1", "stage=generate"),
        f"output_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert (f"expert: {end!r}, which ends a thought" in done.stderr) == warns


@pytest.mark.slow
def test_choices_are_about_the_answer():
    generator = triple("e", "<think>")
    for each in generator.generate(
        PROMPTS,
        think_budget=6,
        choices=["a", "b"],
        max_new_tokens=30,
        prefixes=["The answer is:"] * 4,
    ):
        assert set(each.text) <= set("ab ")
    single = generator.generate([PROMPTS[0]], think_budget=6, choices=["a"], max_new_tokens=30)
    assert single[0].text.strip() and set(single[0].text) <= set("a ")


@pytest.mark.slow
def test_without_a_thought_nothing_changes():
    """A completion that begins no thought is what it would be without tags."""
    thinks, plain = triple("</think>"), triple("</think>")
    plain.members["expert"].spec = ModelSpec("x")
    prompts, settings = ["One", "Two clips"], {"max_new_tokens": 20, "stop": ["a", "e"]}
    got, want = (each.generate(prompts, **settings) for each in (thinks, plain))
    assert [each.text for each in got] == [each.text for each in want]
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
    assert [each.extra["thought"]["end"] for each in got] == ["none", "none"]


@pytest.mark.slow
def test_thousands_of_tokens_of_a_row():
    config = {"max_position_embeddings": 8192, "layers": 1, "hidden": 16}
    tokenizer = tiny_tokenizer()
    models = {r: LoadedModel(tiny_model(seed=s, **config), tokenizer) for s, r in enumerate("ab")}
    models["b"].spec = ModelSpec("x", format=PromptFormat(think_end="</think>"))
    generator = proxytune.load(models["a"], models["b"], models["a"])
    how = {"max_new_tokens": 2000, "think_budget": 1900, "ignore_eos": True}
    found = generator.generate(["One <think>", "Two <think>"], speculative=False, **how)
    assert [len(each.token_ids) for each in found] == [2000, 2000]
    assert [each.extra["thought"]["end"] for each in found] == ["budget", "budget"]
    (alone,) = generator.generate(["Two <think>"], speculative=3, **how)
    assert alone.token_ids == found[1].token_ids


# -- a model that thinks, scored by GSM8K --------------------

ROWS = [("Ann has 7 hens.", "18"), ("Bob sold 9 cups.", "24")]


def thought(target: str) -> str:
    return f"<think>Let me see.\nQuestion: is it {int(target) + 5}? No.</think>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model that has learnt two thoughts by heart, and the same one untrained."""
    root = tmp_path_factory.mktemp("thinks")
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    shape = {"hidden": 48, "layers": 2, "scale": 1.0}
    for role in ("base", "antiexpert"):
        save_tiny(root / role, tokenizer=tokenizer, **shape)
    model = tiny_model(**shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = []
    for question, target in ROWS:
        user = f"Answer the following question.\n\nQuestion: {question}"
        asked = f"<|user|>{user}<|assistant|>"
        rows.append(
            tokenizer(
                f"{asked}{thought(target)}Answer: {target}</s>", add_special_tokens=False
            ).input_ids
        )
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    for _ in range(250):
        loss = model(ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    model.eval().save_pretrained(root / "expert")
    tokenizer.save_pretrained(root / "expert")
    lines = [json.dumps({"question": q, "answer": f"So.\n#### {t}"}) for q, t in ROWS]
    (root / "gsm8k.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.slow
def test_gsm8k_scores_the_answer_of_a_model_that_thinks(folder, tmp_path):
    models = [f"triple.{role}.id={folder / role}" for role in ("base", "antiexpert", "expert")]
    models += [f"triple.{role}.dtype=float32" for role in ("base", "antiexpert", "expert")]
    given = [
        *(*models, "experiment=none", "name=x", "task=[gsm8k]", "report=false", "machine=cpu"),
        f"task.gsm8k.path={folder / 'gsm8k.jsonl'}",
        *(
            "systems=[expert,proxy]",
            "decoding.max_new_tokens=150",
            "triple.expert.format.kind=chat",
        ),
    ]
    tag = "triple.expert.format.think_end='</think>'"
    done = call(cli.run, *given, tag, f"output_dir={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    for system in ("expert", "proxy"):
        place = tmp_path / "a" / "gsm8k" / system
        lines = [json.loads(x) for x in (place / "completions.jsonl").read_text().splitlines()]
        by_id = {each["example_id"]: each for each in lines}
        for number, (_, target) in enumerate(ROWS):
            assert by_id[str(number)]["text"].strip() == target
            assert by_id[str(number)]["raw_text"].startswith(thought(target)[:-2])
        scores = [json.loads(x) for x in (place / "scores.jsonl").read_text().splitlines()]
        assert [s["values"] for s in scores] == [{"acc": 1.0, "acc_numeric": 1.0}] * 2
    cell = json.loads((tmp_path / "a" / "gsm8k" / "expert" / "cell.json").read_text())
    assert cell["members"]["base"]["format"]["think_end"] == "</think>"
    # without the tag, and in a folder of another setting
    done = call(cli.run, *given, f"output_dir={tmp_path / 'a'}")
    assert done.returncode == 1 and "think_end" in done.stderr
    done = call(cli.run, *given, tag, "decoding.think_budget=20", f"output_dir={tmp_path / 'a'}")
    assert done.returncode == 1 and "think_budget" in done.stderr
    done = call(cli.run, *given, tag, "decoding.max_new_tokens=2", f"output_dir={tmp_path / 'b'}")
    assert done.returncode == 1 and "no room for a thought" in done.stderr


@pytest.mark.slow
def test_other_folders_know_no_tags(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert loaded.config.vocab_size == 300
    models = [f"triple.{role}.id={folder / 'base'}" for role in ("base", "antiexpert", "expert")]
    given = [f"task.gsm8k.path={folder / 'gsm8k.jsonl'}", "experiment=none", "name=x"]
    given += ["task=[gsm8k]", "report=false", "machine=cpu", "systems=[base]", *models]
    done = call(cli.run, *given, "decoding.max_new_tokens=4", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    cell = json.loads((tmp_path / "gsm8k" / "base" / "cell.json").read_text())
    assert not [key for key in cell["members"]["base"]["format"] if key.startswith("think")]
    assert not [key for key in cell["decoding"] if key.startswith("think")]
