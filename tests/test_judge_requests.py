"""Judges that refuse what alpaca-eval sends: the o-series and gpt-5, as a local stand-in."""

from pathlib import Path
from typing import Any

import pytest

from proxytune.errors import UserError
from tasks import judge_requests
from tasks.alpaca_judge import AlpacaJudge
from tests.openai_server import FakeOpenAI, openai_server
from tests.test_alpaca_judge import examples, prefers_good

WORDS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the "
    "default (1) value is supported.",
    "top_p": "Unsupported parameter: 'top_p' is not supported with this model.",
    "logprobs": "You are not allowed to request logprobs: it is not supported with this model.",
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(judge_requests, "_found", {})


def reasoner(*refused: str, coded: bool = True, thinks: int = 0) -> Any:
    """A model that refuses settings by name, and spends tokens on thoughts that nobody sees."""

    def answer(body: dict[str, Any]) -> Any:
        for name in refused:
            if name in body and (name, body[name]) != ("temperature", 1):
                error: dict[str, Any] = {"message": WORDS[name], "type": "invalid_request_error"}
                if coded:
                    error |= {"param": name, "code": "unsupported_parameter"}
                return 400, {"error": error}
        if body.get("max_completion_tokens", 10**6) < thinks:
            empty = {"role": "assistant", "content": ""}
            return {"message": empty, "finish_reason": "length"}
        probing = "Say m" in str(body["messages"])
        return "m" if probing else prefers_good(body)

    return answer


def make(server: FakeOpenAI, tmp_path: Path, **settings: Any) -> AlpacaJudge:
    return AlpacaJudge(base_url=server.url, cache=str(tmp_path / "j.sqlite"), **settings)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize(
    "refused",
    [
        ("max_tokens", "temperature"),  # issue 13
        ("max_tokens", "temperature", "top_p"),
        ("temperature",),
        ("max_tokens",),
    ],
)
def test_check_finds_out_how_a_model_wants_to_be_asked(tmp_path, refused, coded):
    """Fails on 538a493: check() asked nobody, and scoring ended with the server's 400."""
    with openai_server(reasoner(*refused, coded=coded)) as server:
        judge = make(server, tmp_path, model="o4-mini")
        judge.check()
        assert len(server.requests) == len(refused) + 1
        server.requests.clear()
        assert judge.annotate(examples(4), ["good"] * 4) == [1.0] * 4
    assert len(server.requests) == 4  # none of them is refused
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    for body in server.requests:
        assert body[limit] == 100 and not set(refused) & body.keys()
    left_out = sorted({"temperature", "top_p"} & set(refused))
    asked = {"limit": limit} if "max_tokens" in refused else {}
    assert judge.identity()["asked"] == asked | ({"left_out": left_out} if left_out else {})


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        ("`temperature` and `top_p` cannot both be specified for this model.", ["top_p"]),
        ("temperature: `temperature` is deprecated for this model.", ["temperature"]),
        ("Unrecognized request argument supplied: top_p", ["top_p"]),
        ("Model grok-4 does not support parameter topP.", ["top_p"]),
        ("invalid temperature: only 1 is allowed for this model", ["temperature"]),
        ([{"loc": ["body", "top_p"], "msg": "Extra inputs are not permitted"}], ["top_p"]),
        ("temperature, top_p and n are fixed at 1", ["temperature", "top_p"]),
    ],
)
def test_other_servers_words(tmp_path, words, left_out):
    """Claude, Azure, xAI, Moonshot, Mistral, o1; none of them was understood."""

    def answer(body: dict[str, Any]) -> Any:
        if body.keys() & set(left_out):
            key = "detail" if isinstance(words, list) else "message"
            return 400, {"error": {key: words}}
        return "m" if "Say m" in str(body["messages"]) else prefers_good(body)

    with openai_server(answer) as server:
        judge = make(server, tmp_path, model="m")
        judge.check()
        assert judge.identity()["asked"] == {"left_out": left_out}
        assert judge.annotate(examples(2), ["good"] * 2) == [1.0] * 2


def test_an_error_about_one_prompt_changes_no_setting(tmp_path):
    """It repeats the prompt, in which a setting's name is a word."""

    def answer(body: dict[str, Any]) -> Any:
        if "task 1?" in str(body["messages"]):
            return 400, {"error": {"message": "the temperature of task 1? is not allowed"}}
        return "m" if "Say m" in str(body["messages"]) else prefers_good(body)

    with openai_server(answer) as server:
        judge = make(server, tmp_path, max_retries=0)
        judge.check()
        with pytest.raises(UserError, match="temperature of task 1"):
            judge.annotate(examples(3), ["good"] * 3)
    assert "asked" not in judge.identity()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "Insufficient credits", "code": 402}}, "402, Insufficient credits"),
        ("<html>hi</html>", "<html>hi</html>"),
        ({"choices": []}, "no completion"),
    ],
)
def test_what_is_no_completion_is_said_by_check(tmp_path, body, said):
    """Status 200: check() was content, and scoring failed."""
    with openai_server(lambda _: (200, body)) as server, pytest.raises(UserError, match=said):
        make(server, tmp_path).check()


def test_a_server_that_ignores_the_wish_for_log_probabilities_is_refused_by_check(tmp_path):
    """It answers with status 200; then no answer held a verdict."""
    with openai_server(lambda _: "m") as server:
        judge = make(server, tmp_path, annotator="weighted_alpaca_eval_gpt4_turbo")
        with pytest.raises(UserError, match="gives no log-probabilities"):
            judge.check()


def test_an_address_with_a_query_is_refused(tmp_path):
    url = "https://x.openai.azure.com/openai/deployments/gpt-4?api-version=2024-10-21"
    with pytest.raises(UserError, match=r"has a query.*/openai/v1"):
        AlpacaJudge(base_url=url).check()


def test_scoring_alone_finds_it_out_too(tmp_path):
    with openai_server(reasoner("max_tokens", "temperature")) as server:
        judge = make(server, tmp_path, model="gpt-5", concurrency=2)
        assert judge.annotate(examples(6), ["good"] * 6) == [1.0] * 6


def test_an_answer_lost_in_thought_is_asked_for_again_with_room(tmp_path):
    with openai_server(reasoner("max_tokens", "temperature", thinks=900)) as server:
        judge = make(server, tmp_path, model="gpt-5")
        assert judge.annotate(examples(2), ["good"] * 2) == [1.0] * 2
    assert {b.get("max_completion_tokens") for b in server.requests} == {None, 100, 4196}


def test_a_model_that_lacks_what_the_annotator_needs_is_refused_by_check(tmp_path):
    with openai_server(reasoner("max_tokens", "logprobs")) as server:
        judge = make(
            server, tmp_path, model="o3", annotator="weighted_alpaca_eval_gpt-4o-mini-2024-07-18"
        )
        with pytest.raises(UserError, match=r"judge o3 refuses logprobs.*annotator="):
            judge.check()


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (
            401,
            {"message": "Incorrect API key provided"},
            r"401 \(Incorrect API.*stage=generate",
        ),
        (404, {"message": "The model o9 does not exist"}, r"404 \(The model o9"),
        (429, {"message": "You exceeded your quota", "code": "insufficient_quota"}, "quota"),
        (400, {"message": "no room"}, r"400 \(no room"),
    ],
)
def test_what_cannot_be_mended_is_said_by_check(tmp_path, status, error, said):
    """Fails on 538a493: found out after hours of generation."""
    with openai_server(lambda _: (status, {"error": error})) as server:
        with pytest.raises(UserError, match=said):
            make(server, tmp_path).check()
        assert len(server.requests) <= 2


def test_a_judge_that_is_away_is_a_warning_and_keeps_its_identity(tmp_path, caplog, monkeypatch):
    with openai_server(reasoner("max_tokens", "temperature")) as server:
        judge = make(server, tmp_path, model="gpt-5", timeout=2)
        judge.check()
    identity = judge.identity()
    assert "asked" in identity
    monkeypatch.setattr(judge_requests, "_found", {})  # another process
    judge.check()
    assert "does not answer yet" in caplog.text and judge.identity() == identity


def test_a_judge_that_takes_everything_is_asked_once_and_as_ever(tmp_path):
    with openai_server(reasoner()) as server:
        judge = make(server, tmp_path)
        judge.check()
    assert [(b["max_tokens"], b["temperature"]) for b in server.requests] == [(100, 0)]
    assert "asked" not in judge.identity()
