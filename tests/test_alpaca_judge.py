"""AlpacaEval's annotators against a local server that speaks OpenAI's protocol, faults included."""

import _thread
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune.records import Example, Prompt
from tasks import judge as judge_module
from tasks.alpaca_judge import AlpacaJudge
from tasks.judgements import JudgeError
from tests.openai_server import openai_server
from tests.tiny import save_tiny

REFERENCE = "a reference"


def examples(count: int) -> list[Example]:
    prompts = [Prompt(f"task {i}?", f"task {i}?") for i in range(count)]
    return [Example(str(i), p, target=REFERENCE) for i, p in enumerate(prompts)]


def shown_outputs(body: dict) -> tuple[str, str]:
    """The two outputs in the order in which the judge reads them."""
    text = body["messages"][-1]["content"]
    outputs = re.findall(r'"(?:answer|output)": """(.*?)"""', text, flags=re.DOTALL)
    assert len(outputs) == 2, text
    return outputs[0], outputs[1]


def prefers_good(body: dict) -> str:
    """gpt-4-0314's form of answer; the output with "good" in it wins."""
    first_wins = "good" in shown_outputs(body)[0]
    ranks = (1, 2) if first_wins else (2, 1)
    ranking = [{"model": f"model_{i}", "rank": r} for i, r in zip((1, 2), ranks, strict=True)]
    return str(sorted(ranking, key=lambda row: row["rank"]))


def weighs(body: dict) -> dict:
    """AlpacaEval 2's form: "m" is the first output; a good one has probability 0.8."""
    first_good = "good" in shown_outputs(body)[0]
    p_first = 0.8 if first_good else 0.2
    top = [
        {"token": t, "logprob": math.log(p), "bytes": None}
        for t, p in (("m", p_first), ("M", 1 - p_first))
    ]
    token = top[0] | {"top_logprobs": top}
    return {
        "message": {"role": "assistant", "content": "m"},
        "logprobs": {"content": [token], "refusal": None},
    }


def make(server, tmp_path: Path, **settings) -> AlpacaJudge:
    return AlpacaJudge(base_url=server.url, cache=str(tmp_path / "j.sqlite"), **settings)


def test_wins_losses_and_draws_whatever_the_order_shown(tmp_path):
    texts = ["good"] * 12 + ["poor"] * 12 + [REFERENCE] * 2
    cases = examples(26)
    cases[12:24] = [Example(e.id, e.prompt, "good reference") for e in cases[12:24]]
    with openai_server(prefers_good) as server:
        verdicts = make(server, tmp_path).annotate(cases, texts)
    assert verdicts == [1.0] * 12 + [0.0] * 12 + [0.5] * 2
    assert len(server.requests) == 24  # equal outputs are a draw without a question
    shown_first = [shown_outputs(body)[0] for body in server.requests]
    assert 3 < shown_first.count("good") + shown_first.count("poor") < 21  # the order is mixed
    assert {b["model"] for b in server.requests} == {"gpt-4-0314"}
    assert {(b["temperature"], b["max_tokens"]) for b in server.requests} == {(0, 100)}
    roles = [m["role"] for m in server.requests[0]["messages"]]
    assert roles == ["system", "user"]


def test_the_weighted_annotator_gives_probabilities(tmp_path):
    with openai_server(weighs) as server:
        judge = make(server, tmp_path, annotator="weighted_alpaca_eval_gpt4_turbo", model="mine")
        verdicts = judge.annotate(examples(8), ["good"] * 8)
    assert verdicts == pytest.approx([0.8] * 8)
    assert {b["model"] for b in server.requests} == {"mine"}
    assert all(b["logprobs"] and b["top_logprobs"] == 5 for b in server.requests)


def test_an_annotator_that_calls_functions(tmp_path):
    def calls_function(body: dict) -> dict:
        ordered = {"ordered_models": json.loads(prefers_good(body).replace("'", '"'))}
        function = {"name": "make_leaderboard", "arguments": json.dumps(ordered)}
        call = {"id": "1", "type": "function", "function": function}
        return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}

    with openai_server(calls_function) as server:
        judge = make(server, tmp_path, annotator="alpaca_eval_gpt4_fn")
        assert judge.annotate(examples(4), ["good"] * 4) == [1.0] * 4
    assert server.requests[0]["tools"]


def test_a_rate_limit_is_waited_out(tmp_path):
    busy = (429, {"Retry-After": "0.4"})
    with openai_server(prefers_good, faults=[busy, busy]) as server:
        start = time.monotonic()
        judge = make(server, tmp_path, concurrency=1)
        assert judge.annotate(examples(2), ["good"] * 2) == [1.0] * 2
    assert server.refused == 2 and len(server.requests) == 4
    assert time.monotonic() - start >= 0.8


def test_a_judge_that_fails_stops_and_loses_nothing(tmp_path):
    cases, texts = examples(10), ["good"] * 10
    with openai_server(prefers_good, broken_from=7) as server:
        judge = make(server, tmp_path, max_retries=0, concurrency=2)
        with pytest.raises(JudgeError, match=r"failed after \d of 10 answers.*kept"):
            judge.annotate(cases, texts)
        server.broken_from = None
        server.requests.clear()
        assert judge.annotate(cases, texts) == [1.0] * 10
        assert len(server.requests) == 4  # six were kept
        server.requests.clear()
        assert judge.annotate(cases, texts) == [1.0] * 10
        assert not server.requests


@pytest.mark.slow
def test_an_interrupt_sends_nothing_more(tmp_path):
    answered = 0

    def interrupts(body: dict) -> str:
        nonlocal answered
        answered += 1
        if answered == 5:
            _thread.interrupt_main()
        time.sleep(0.05)
        return prefers_good(body)

    with openai_server(interrupts) as server:
        judge = make(server, tmp_path, concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            judge.annotate(examples(40), ["good"] * 40)
        assert len(server.requests) <= 10  # each is paid for
        before = len(server.requests)
        assert judge.annotate(examples(40), ["good"] * 40) == [1.0] * 40
    assert 40 <= len(server.requests) < 40 + before  # what was under way may be asked again


def test_a_wrong_key_is_an_error_and_not_a_score(tmp_path):
    refused = openai_server(prefers_good, faults=[(401, {})] * 9)
    with refused as server, pytest.raises(JudgeError, match="401"):
        make(server, tmp_path).annotate(examples(3), ["good"] * 3)


def test_a_server_that_is_away_is_an_error(tmp_path):
    with openai_server(prefers_good) as server:
        judge = make(server, tmp_path, max_retries=1)
    with pytest.raises(JudgeError, match="Connection refused"):
        judge.annotate(examples(1), ["good"])


def test_one_answer_without_a_verdict_leaves_the_denominator(tmp_path):
    def sometimes(body: dict) -> str:
        return "I cannot say." if "task 3?" in str(body) else prefers_good(body)

    with openai_server(sometimes) as server:
        verdicts = make(server, tmp_path).annotate(examples(25), ["good"] * 25)
    assert verdicts == [1.0] * 3 + [None] + [1.0] * 21


def test_a_judge_without_verdicts_is_broken(tmp_path):
    polite = openai_server(lambda _: "As a language model, I like both.")
    with polite as server, pytest.raises(JudgeError, match=r"5 of 5 answers .* hold no verdict"):
        make(server, tmp_path).annotate(examples(5), ["good"] * 5)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded", None])
def test_a_prompt_that_the_service_refuses_is_one_without_a_verdict(tmp_path, code):
    """Asking again would not help, and it must not keep the others from their score."""
    refused = {"error": {"message": "the maximum context length is 8192 tokens", "code": code}}

    def sometimes(body: dict) -> Any:
        return (400, refused) if "task 3?" in str(body) else prefers_good(body)

    with openai_server(sometimes) as server:
        judge = make(server, tmp_path)
        for _ in range(2):
            verdicts = judge.annotate(examples(25), ["good"] * 25)
            assert verdicts == [1.0] * 3 + [None] + [1.0] * 21
    assert len(server.requests) == 25


@pytest.mark.parametrize("body", [[1], {"error": {"message": "busy"}}, {"choices": []}])
def test_what_is_no_completion_stops_with_a_message(tmp_path, body):
    answer = openai_server(lambda _: (200, body))
    with answer as server, pytest.raises(JudgeError, match=r"failed after 0 of 2.*no completion"):
        make(server, tmp_path).annotate(examples(2), ["good"] * 2)


def test_another_endpoint_judges_anew_however_it_is_named(tmp_path, monkeypatch):
    cache = str(tmp_path / "j.sqlite")
    for _ in range(2):
        with openai_server(prefers_good) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            AlpacaJudge(cache=cache).annotate(examples(2), ["good"] * 2)
            AlpacaJudge(cache=cache).annotate(examples(2), ["good"] * 2)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"base_url": "localhost:8000/v1"}, "no address"), ({"concurrency": 0}, "concurrency=0")],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_generated(settings, said):
    with pytest.raises(ValueError, match=said):
        AlpacaJudge(**{"base_url": "http://127.0.0.1:1/v1"} | settings).check()


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "text", ["", " ", "\ud83d", "{output_2} {instruction}", '"""', "x" * 50_000]
)
def test_odd_completions_are_judged(tmp_path, text):
    first = "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
    with openai_server(lambda _: first) as server:
        assert make(server, tmp_path).annotate(examples(1), [text])[0] in (0.0, 1.0)


def test_a_missing_key_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY.*base_url.*local.*stage=generate"):
        AlpacaJudge().check()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    AlpacaJudge().check()
    monkeypatch.delenv("OPENAI_API_KEY")
    AlpacaJudge(base_url="http://127.0.0.1:1/v1").check()


def test_the_key_is_sent_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with openai_server(prefers_good) as server:
        make(server, tmp_path, api_key_env="MY_KEY").annotate(examples(1), ["good"])
    assert server.keys == {"Bearer sk-secret-123"}
    assert b"sk-secret" not in (tmp_path / "j.sqlite").read_bytes()


def test_an_unknown_annotator_is_refused_with_close_names():
    with pytest.raises(ValueError, match=r"did you mean .*alpaca_eval_gpt4_0314"):
        AlpacaJudge(annotator="alpaca_eval_gpt4_0134").check()


def test_an_annotator_of_ones_own(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    template = "<|im_start|>user\n{instruction}|{output_1}|{output_2}<|im_end|>"
    (folder / "prompt.txt").write_text(template)
    (folder / "configs.yaml").write_text(
        "mine:\n  prompt_template: mine/prompt.txt\n  fn_completions: openai_completions\n"
        "  completions_kwargs: {model_name: m, max_tokens: 1, temperature: 0}\n"
        "  fn_completion_parser: regex_parser\n"
        "  completion_parser_kwargs: {outputs_to_match: {1: 'first', 2: 'second'}}\n"
    )

    def answer(body: dict) -> str:
        first = body["messages"][0]["content"].split("|")[1]
        return "first" if first == "good" else "second"

    with openai_server(answer) as server:
        judge = make(server, tmp_path, annotator=str(folder))
        assert judge.annotate(examples(6), ["good"] * 6) == [1.0] * 6


@pytest.mark.slow
def test_a_local_model_judges_through_the_same_annotator(tmp_path, monkeypatch):
    """A random model has no verdicts in gpt-4-0314's form, but next-token probabilities it has."""
    folder = save_tiny(tmp_path / "model", max_position_embeddings=2048)
    settings = {"id": str(folder), "batch_size": 2}
    judge = AlpacaJudge(
        annotator="weighted_alpaca_eval_gpt4_turbo",
        local=settings,
        cache=str(tmp_path / "j.sqlite"),
    )
    judge.check()
    with pytest.raises(JudgeError, match="hold no verdict"):
        judge.annotate(examples(3), ["good"] * 3)

    # the same model with its bias set so that "m" and "M" always lead, "m" three to one
    tokenizer = judge_module.AutoTokenizer.from_pretrained(folder)
    real: Any = AutoModelForCausalLM.from_pretrained

    def biased(*args, **kwargs):
        model, loading = real(*args, **kwargs)
        head: Any = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        with torch.no_grad():
            head.weight.mul_(0)
            head.bias[tokenizer.convert_tokens_to_ids("m")] = 50 + math.log(3)
            head.bias[tokenizer.convert_tokens_to_ids("M")] = 50
        return model, loading

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", biased)
    fresh = AlpacaJudge(annotator=judge.annotator, local=settings, cache=None)
    verdicts = fresh.annotate(examples(12), ["good"] * 12)
    # whichever output was shown first has 0.75
    assert {round(v, 3) for v in verdicts if v is not None} == {0.25, 0.75}


def test_a_local_judge_refuses_function_calls(tmp_path):
    with pytest.raises(ValueError, match="function calls"):
        AlpacaJudge(annotator="alpaca_eval_gpt4_fn", local={"id": str(tmp_path)}).check()
