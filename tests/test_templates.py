"""Chat templates are rendered for every task before a model is loaded.

The refusals fail on 538a493: the base's completions were generated first, then a jinja2 error
ended the run.
"""

import json
import logging
import sys
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tiny import tiny_tokenizer

import proxytune
from proxytune import cli
from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.loading.load import check_triple
from proxytune.loading.prompting import PromptFormat, render_messages
from proxytune.loading.spec import ModelSpec
from proxytune.training.data import tokenize
from tasks.lm_eval_task import LmEvalTask

POCKET = ROOT / "pocket" / "models"
TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% endfor %}" + TURNS
)
TOOLS = "{% for tool in tools %}{{ tool.name }}{% endfor %}" + TURNS  # `tools` is None without any
BROKEN = "{{ messages[0]['content']['text'].strip() }}" + TURNS
DIVIDES = "{{ messages|length / 0 }}" + TURNS
ENDLESS = "{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}" + TURNS
SHAREGPT = "{% for m in messages %}{{ m['from'] }}: {{ m['value'] }}\n{% endfor %}"
SYNTAX = "{% for m in messages %}{{ m['content'] }}"


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def run(monkeypatch, capsys, *arguments: str) -> str:
    """The error line of a run of the pocket triple that is refused."""
    monkeypatch.setattr(sys, "argv", ["run.py", "limit=3", "report=false", *arguments])
    with pytest.raises(SystemExit):
        cli.run()
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("template", "reason", "way_out"),
    [
        (GEMMA, "System role not supported", "triple.expert.format.use_system=false"),
        (ALTERNATE, "roles must alternate", "triple.expert.format.use_system=false"),
    ],
)
def test_a_template_that_refuses_a_task_is_found_before_a_model_is_loaded(
    template, reason, way_out, tmp_path, monkeypatch, capsys, no_weights
):
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    chat = f"triple.expert.format={{kind: chat, chat_template: {file}}}"
    arguments = [
        "task=[pocket_gsm8k,pocket_truthfulqa_open]",
        "systems=[base,proxy]",
        "task.pocket_truthfulqa_open.system_prompt=paper",
        chat,
        f"output_dir={tmp_path / 'out'}",
    ]
    line = run(monkeypatch, capsys, *arguments)
    for part in ("task pocket_truthfulqa_open", "expert", reason, way_out):
        assert part in line
    assert not list((tmp_path / "out").glob("*/*/cell.json"))  # the way out goes on in the folder


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TOOLS, "NoneType"),
        (BROKEN, "has no attribute 'text'"),
        (SYNTAX, "unexpected end|Unexpected end"),
        (DIVIDES, "division by zero"),  # a traceback on fadf341, as the next one
        (ENDLESS, "recursion"),
        (SHAREGPT, "leaves out what the user says"),  # a warning on fadf341
        (None, "has no chat template"),
    ],
)
def test_a_template_that_renders_nothing_is_found_with_the_models(tmp_path, template, reason):
    folder = tmp_path / "model"
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((POCKET / "expert" / "config.json").read_text())
    spec = ModelSpec(str(folder), format=PromptFormat("chat"))
    with pytest.raises(UserError, match=reason) as caught:
        check_triple({"expert": spec})
    assert str(caught.value).startswith("expert: ")
    assert "\n" not in str(caught.value)


def test_todays_date_in_prompts_is_said(tmp_path, caplog):
    """Llama 3.1's template: two days, two prompts."""
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + TURNS
    tiny_tokenizer(chat_template=dated).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((POCKET / "expert" / "config.json").read_text())
    given = PromptFormat("chat", template_kwargs={"date_string": "26 Jul 2024"})
    check_triple({"expert": ModelSpec(str(tmp_path), format=given)})
    assert "date" not in caplog.text
    check_triple({"expert": ModelSpec(str(tmp_path), format=PromptFormat("chat"))})
    assert "writes today's date into every prompt" in caplog.text


def test_a_refusal_is_one_line_everywhere():
    """538a493 gave jinja2's own error."""
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    tokenizer = tiny_tokenizer(chat_template=GEMMA)
    with pytest.raises(UserError, match=r"turns system, user: System role not.*use_system=false"):
        render_messages(turns, PromptFormat("chat"), tokenizer)
    assert render_messages(turns, PromptFormat("chat", use_system=False), tokenizer).text
    row = {"messages": [*turns, {"role": "assistant", "content": "A"}]}
    with pytest.raises(UserError, match="System role not supported"):
        tokenize([row], tokenizer, 99)
    with pytest.raises(UserError, match="System role not supported"):
        generator = proxytune.load(str(POCKET / "antiexpert"))
        generator.members["base"].tokenizer.chat_template = GEMMA
        generator.members["base"].spec.format = PromptFormat("chat")
        generator.encode(turns)


def test_a_template_that_loses_a_turn_or_ends_the_text_is_said(tmp_path, caplog):
    from proxytune.experiment.prompts import _render_all

    fmt = PromptFormat("chat")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "U"}]
    deaf = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}</s>\n{% endfor %}"
    with caplog.at_level(logging.WARNING):
        _render_all("task t: expert (m)", "expert", [turns] * 3, fmt, tiny_tokenizer())
        assert not caplog.text
        _render_all(
            "task t: expert (m)", "expert", [turns] * 3, fmt, tiny_tokenizer(chat_template=deaf)
        )
    assert caplog.text.count("leaves out the system turn") == 1
    assert caplog.text.count("ends the prompt with the end token </s>") == 1


def test_the_conversations_of_lm_eval_tasks():
    folder = str(Path(__file__).parent / "lm_eval_tasks")
    names = sorted(path.stem for path in Path(folder).glob("*.yaml"))
    asked = {
        name: LmEvalTask(name, include_path=folder, apply_chat_template=True, num_fewshot=shots)
        for name, shots in ((names[0], 0), (names[1], 1))
    }
    for task in asked.values():
        for turns in task.conversations():
            roles = [turn["role"] for turn in turns if turn["role"] != "system"]
            assert roles[0] == "user"
            assert roles == [*["user", "assistant"] * (len(roles) // 2), "user"][: len(roles)]
    assert LmEvalTask(names[0], include_path=folder).conversations() == []


@pytest.mark.slow
def test_end_tokens_are_in_run_json(tmp_path, monkeypatch):
    """See test_ends.py; here the record of a run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "expert"
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "expert")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(POCKET / "expert", dtype=torch.float32)
    model.resize_token_embeddings(1507, mean_resizing=False)
    model.generation_config.eos_token_id = 1506
    model.save_pretrained(folder)
    output = tmp_path / "out"
    arguments = [
        "limit=2",
        "report=false",
        "task=[pocket_gsm8k]",
        "systems=[base,proxy]",
        f"triple.expert.id={folder}",
        f"output_dir={output}",
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    cli.run()
    found = json.loads((output / "run.json").read_text())["end_tokens"]
    assert found == {"token": 2, "of": {"expert": [2, 1506]}}


def test_jinja_is_what_transformers_raises():
    with pytest.raises(TemplateError):
        tiny_tokenizer(chat_template=GEMMA).apply_chat_template(
            [{"role": "system", "content": "S"}], tokenize=False
        )
