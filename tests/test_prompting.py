"""Prompts: the release's bytes for raw and chat members, and what a template may and may not do."""

import json
from pathlib import Path

import pytest
from release import task_of
from tiny import tiny_tokenizer

from proxytune.errors import UserError
from proxytune.loading.prompting import PromptFormat, encode, render, render_messages
from proxytune.records import Prompt
from tasks.alpaca_eval import AlpacaEval
from tasks.gsm8k import GSM8K
from tasks.truthfulqa import TruthfulQAMC, TruthfulQAOpen

GOLDEN = Path(__file__).parent / "golden"
RAW = PromptFormat()
LLAMA2 = PromptFormat("chat", "llama2")
BOS = "<s>"
PROMPT = Prompt(raw="Q\nA:", user="Q", system="Be kind.", response_prefix="A:")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gsm8k", GSM8K(path=str(GOLDEN / "gsm8k.jsonl"))),
        ("truthfulqa_mc", TruthfulQAMC(path=str(GOLDEN / "truthfulqa.csv"))),
        ("truthfulqa_open", TruthfulQAOpen(path=str(GOLDEN / "truthfulqa.csv"))),
        ("alpaca_eval", AlpacaEval(path=str(GOLDEN / "alpaca_eval.json"))),
    ],
)
def test_first_prompt_is_the_releases(name, task, tokenizer):
    golden = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["first"][name]
    prompt = task.examples()[0].prompt
    assert render(prompt, RAW, tokenizer).text == golden["raw"]
    assert render(prompt, LLAMA2, tokenizer).text == BOS + golden["chat"]


def test_every_example_prompt_of_the_release(shared, tokenizer):
    files = sorted((shared / "published").glob("*/*/example*prompt.txt"))
    files = [f for f in files if f.parent.parent.name != "ds1000"]  # has tests of its own
    assert len(files) == 27
    made = {}
    for file in files:
        golden = file.read_bytes().decode("utf-8")
        key = (file.parent.parent.name, file.name)
        if key not in made:
            made[key] = task_of(file, shared).examples()[0].prompt
        chat = golden.startswith("[INST]")
        text = render(made[key], LLAMA2 if chat else RAW, tokenizer).text
        assert text == (BOS if chat else "") + golden, file


def test_chat_template_writes_the_only_bos(tokenizer):
    ids = encode(render(PROMPT, LLAMA2, tokenizer), tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nQ [/INST] A:")


def test_raw_leaves_bos_to_the_tokenizer(tokenizer):
    rendered = render(PROMPT, RAW, tokenizer)
    assert (rendered.text, rendered.add_special_tokens) == ("Q\nA:", True)


def test_own_template_and_its_white_space(tokenizer):
    text = render(PROMPT, PromptFormat("chat"), tokenizer).text
    assert text == "<s><|system|>\nBe kind.\n<|user|>\nQ\n<|assistant|>\nA:"


def test_system_turn_can_be_dropped(tokenizer):
    fmt = PromptFormat("chat", "llama2", use_system=False)
    assert render(PROMPT, fmt, tokenizer).text == "<s>[INST] Q [/INST] A:"


THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinks %}<think>{% endif %}"


@pytest.mark.parametrize(("given", "end"), [({"thinks": True}, "<think>"), ({}, ""), (None, "")])
def test_variables_of_a_template_are_given_to_it(tokenizer, given, end):
    tokenizer.chat_template = THINKS
    fmt = PromptFormat("chat", template_kwargs=given)
    assert render(Prompt(raw="Q", user="Q"), fmt, tokenizer).text == f"Q{end}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"thinking": True}, "does not read format.template_kwargs.thinking"),
        ({"think": True}, "does not read format.template_kwargs.think"),  # a part of a word
        ({"tokenize": True}, "no variable of a template's own"),
        ({"add_generation_prompt": False}, "no variable of a template's own"),
    ],
)
def test_variables_that_a_template_ignores_are_refused(tokenizer, given, words):
    tokenizer.chat_template = THINKS
    fmt = PromptFormat("chat", template_kwargs=given)
    with pytest.raises(UserError, match=words):
        render(Prompt(raw="Q", user="Q"), fmt, tokenizer)


def test_variables_need_a_template():
    with pytest.raises(UserError, match=r"give format\.kind=chat"):
        PromptFormat("raw", template_kwargs={"thinks": True})


def test_no_prefix_no_space(tokenizer):
    assert render(Prompt(raw="Q", user="Q"), LLAMA2, tokenizer).text == "<s>[INST] Q [/INST]"


def test_contents_are_not_stripped(tokenizer):
    assert render(Prompt("", user=" Q\n"), LLAMA2, tokenizer).text == "<s>[INST]  Q\n [/INST]"


def test_conversation(tokenizer):
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    chat = render_messages(turns, LLAMA2, tokenizer)
    assert chat.text == ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]")
    assert render_messages(turns, RAW, tokenizer).text == "S\n\na\n\nb\n\nc"
    assert turns[0]["role"] == "system"  # left as it was


def test_template_file(tmp_path, tokenizer):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    assert render(PROMPT, PromptFormat("chat", str(file)), tokenizer).text == "Be kind.|Q| A:"


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="neither raw nor chat"):
        PromptFormat("chatty")
    with pytest.raises(ValueError, match=r"no_such.*llama2"):
        PromptFormat("chat", "no_such")
    with pytest.raises(ValueError, match=r"format\.chat_template"):
        render(PROMPT, PromptFormat("chat"), tiny_tokenizer(chat_template=None))
    with pytest.raises(ValueError, match="at least one message"):
        render_messages([], RAW, tokenizer)
    with pytest.raises(ValueError, match="turn of the user"):
        render_messages([{"role": "assistant", "content": "b"}], LLAMA2, tokenizer)
