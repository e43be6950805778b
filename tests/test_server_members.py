"""The members' log-probabilities, and answers that begin with given tokens."""

import json

import pytest
import requests
import torch

from proxytune import api
from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = "Natalia sold clips to"
ASKED = {"model": "tiny", "temperature": 0, "max_tokens": 6, "member_logprobs": 3}


def members() -> list:
    return [tiny_model(seed=0), tiny_model(seed=1, hidden=16), tiny_model(seed=2, hidden=16)]


@pytest.fixture(scope="module")
def alone() -> api.Generator:
    return api.load(*members(), alpha=0.7, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def url():
    systems = {
        "tiny": api.load(*members(), alpha=0.7, tokenizer=tiny_tokenizer()),
        "single": api.load(members()[0], tokenizer=tiny_tokenizer()),
    }
    with running(create_app(systems, ServerSettings(max_logprobs=5), speculative=3)) as url:
        yield url


def post(url, path="completions", **body):
    answer = requests.post(f"{url}/{path}", json=ASKED | body, timeout=60)
    return answer.status_code, answer.json()


def streamed(url, path="completions", **body) -> list[dict]:
    answer = requests.post(f"{url}/{path}", json=ASKED | body | {"stream": True}, timeout=60)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0] for line in lines]


def brute(alone, ids: list[int], place: int) -> dict[str, torch.Tensor]:
    """Role -> log-probabilities of the token at a place, by forward passes without a cache."""
    logits = {
        role: member.model(torch.tensor([ids[:place]])).logits[0, -1].float()
        for role, member in alone.members.items()
    }
    logits["system"] = logits["base"] + 0.7 * (logits["expert"] - logits["antiexpert"])
    return {role: each.log_softmax(-1) for role, each in logits.items()}


@pytest.mark.thinned(1)
@torch.no_grad()
def test_every_member_is_that_of_a_pass_without_cache(url, alone):
    status, answer = post(url, prompt=PROMPT, return_token_ids=True)
    assert status == 200
    (choice,) = answer["choices"]
    prompt, written = choice["prompt_token_ids"], choice["token_ids"]
    assert [each["token_id"] for each in choice["member_logprobs"]] == written
    assert "".join(each["token"] for each in choice["member_logprobs"]) == choice["text"]
    for number, each in enumerate(choice["member_logprobs"]):
        expected = brute(alone, [*prompt, *written], len(prompt) + number)
        assert each["members"].keys() == {"system", "base", "expert", "antiexpert"}
        for role, got in each["members"].items():
            token = each["token_id"]
            assert got["logprob"] == pytest.approx(float(expected[role][token]), abs=1e-4)
            assert got["rank"] == 1 + int((expected[role] > expected[role][token]).sum())
            best = expected[role].topk(3)
            assert [top["token_id"] for top in got["top"]] == best.indices.tolist()
            assert [top["logprob"] for top in got["top"]] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )


@pytest.mark.thinned(1)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_has_what_the_whole_answer_has(url, path):
    asked = {"prompt": PROMPT} if path == "completions" else {"messages": [turn("user", PROMPT)]}
    _, answer = post(url, path, **asked)
    whole = answer["choices"][0]["member_logprobs"]
    events = streamed(url, path, **asked)
    parts = [each for event in events for each in event.get("member_logprobs", [])]
    assert [each["token_id"] for each in parts] == [each["token_id"] for each in whole]
    for got, want in zip(parts, whole, strict=True):
        assert got["members"]["expert"]["logprob"] == pytest.approx(
            want["members"]["expert"]["logprob"], abs=1e-4
        )


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_confirmed_drafts_are_marked():
    """An expert that is a copy of base and antiexpert guesses every token."""
    base, expert, antiexpert = (tiny_model(seed=1, hidden=16) for _ in range(3))
    same = api.load(base, expert, antiexpert, tokenizer=tiny_tokenizer())
    with running(create_app({"tiny": same}, speculative=3)) as own:
        _, answer = post(own, prompt=PROMPT, max_tokens=9)
    drafted = [each["drafted"] for each in answer["choices"][0]["member_logprobs"]]
    # the prompt's pass gives the first token; then three drafts and one more, in turn
    assert drafted == [False, True, True, True, False, True, True, True, False]


def test_answers_begin_with_given_tokens(url):
    """The rest of an answer comes again after its first half; another token leads elsewhere."""
    _, answer = post(url, prompt=PROMPT, max_tokens=8, return_token_ids=True)
    (choice,) = answer["choices"]
    ids = choice["token_ids"]
    _, rest = post(url, prompt=PROMPT, max_tokens=4, begin_token_ids=ids[:4], return_token_ids=True)
    assert rest["choices"][0]["token_ids"] == ids[4:]
    assert choice["text"].endswith(rest["choices"][0]["text"])
    assert rest["choices"][0]["prompt_token_ids"] == [*choice["prompt_token_ids"], *ids[:4]]
    for messages in ([turn("user", PROMPT)], [turn("user", PROMPT), turn("assistant", "So")]):
        _, chat = post(url, "chat/completions", messages=messages, return_token_ids=True)
        theirs = chat["choices"][0]["token_ids"]
        _, chat = post(
            url,
            "chat/completions",
            messages=messages,
            max_tokens=3,
            begin_token_ids=theirs[:3],
            return_token_ids=True,
        )
        assert chat["choices"][0]["token_ids"] == theirs[3:]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"member_logprobs": 6}, "member_logprobs", "max_logprobs=5"),
        ({"member_logprobs": -1}, "member_logprobs", "greater than or equal to 0"),
        ({"member_logprobs": 1, "model": "single"}, "member_logprobs", "shows no members'"),
        ({"begin_token_ids": [10**6]}, "begin_token_ids", "outside the vocabulary"),
        ({"begin_token_ids": [-1]}, "begin_token_ids", ""),
        ({"begin_token_ids": "a"}, "begin_token_ids", ""),
        ({"begin_token_ids": [3], "echo": True}, "echo", "without echo"),
    ],
)
def test_what_cannot_be_is_refused(url, body, param, words):
    status, answer = post(url, prompt=PROMPT, **body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]
