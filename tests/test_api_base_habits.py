"""Habits of servers that change numbers without a word: each is mended, or refused by name.

Each case fails on fadf341 (wrong texts without a flag, another error, or a traceback).
"""

import math
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.members.api import client as client_module
from proxytune.members.api.faults import Ended
from proxytune.members.api.reading import generated, named
from tests.api_triple import PROMPTS, in_process, over_http
from tests.faulty import faulty

pytestmark = pytest.mark.usefixtures("impatient")


def offer_of(generator: Any) -> Any:
    return generator.members["base"].member.offer


def lists_of(answer: Any) -> list[Any]:
    found = [choice.get("logprobs") or {} for choice in answer["choices"]]
    return [logprobs for logprobs in found if "top_logprobs" in logprobs]


# -- more, or nothing, in place of one position --------------------


def test_more_positions_than_asked_for_are_not_taken_for_the_first(folder, url):
    """A server that does not know max_tokens; its last position was taken."""

    def longer(body, answer):
        for logprobs in lists_of(answer):
            logprobs["top_logprobs"] = logprobs["top_logprobs"] * 3
        return answer

    with (
        faulty(url, edit=longer) as proxy,
        pytest.raises(UserError, match=r"3 positions where one was asked for \(max_tokens=1\)"),
    ):
        over_http(folder, proxy.url, top_logprobs=20, endpoint="completions")


def silent_at_the_end(probed: list[Any]):
    """llama-cpp-python: no list for a token that ends the text; here every third token does.

    Args:
        probed: prompts after which texts go on; as long as it is empty, all do.
    """

    def edit(body, answer):
        for choice in answer["choices"] if probed and body["prompt"] not in probed else []:
            logprobs = choice.get("logprobs")
            if not logprobs or "top_logprobs" not in logprobs:
                continue
            last = logprobs["top_logprobs"][-1]
            best = max(last, key=last.get)
            if sum(best.encode()) % 3 == 0:
                logprobs["top_logprobs"] = logprobs["top_logprobs"][:-1]
                choice["finish_reason"] = "stop"
                answer["usage"]["completion_tokens"] = 0
        return answer

    return edit


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.slow
def test_a_server_that_lists_nothing_where_its_text_ends(folder, url, blocks):
    probed: list[Any] = []
    with faulty(url, edit=silent_at_the_end(probed), refuse=("prompt_logprobs",)) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=-1, blocks=blocks)
        probed.append(proxy.asked[0]["prompt"])
        got = remote.generate(PROMPTS, max_new_tokens=8)
    want = in_process(folder).generate(PROMPTS, max_new_tokens=8)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]


def test_where_it_rates_no_prompts_either_that_is_said_at_once(folder, url):
    probed: list[Any] = []
    lacking = ("prompt_logprobs", "echo")
    with faulty(url, edit=silent_at_the_end(probed), refuse=lacking) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        probed.append(proxy.asked[0]["prompt"])
        before = proxy.hits
        with pytest.raises(UserError, match=r"lists nothing for the token that ends it.*echo"):
            remote.generate(PROMPTS, max_new_tokens=8)
        assert proxy.hits - before < 40


@pytest.mark.slow
def test_echo_without_the_tokens_that_are_added_before_a_text(folder, url):
    def edit(body, answer):
        begun = body.get("echo") and body["prompt"][0] == 1  # <s>
        for logprobs in lists_of(answer) if begun else []:
            logprobs["top_logprobs"] = [None, *logprobs["top_logprobs"][2:]]
        return answer

    with faulty(url, edit=edit, refuse=("prompt_logprobs",)) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        assert offer_of(remote).blocks == "echo"
        got = remote.generate(PROMPTS, max_new_tokens=8)
    want = over_http(folder, url, top_logprobs=20).generate(PROMPTS, max_new_tokens=8)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]


# -- another prompt, another model, another vocabulary --------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize("blocks", [True, False])
def test_a_server_that_cuts_prompts_is_refused(folder, url, blocks):
    def cut(body, answer):
        answer["usage"]["prompt_tokens"] = min(answer["usage"]["prompt_tokens"], 16)
        return answer

    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, blocks=blocks)
        proxy.edit = cut
        with pytest.raises(UserError, match=r"reads 16 tokens in a prompt of \d+: it cuts prompts"):
            remote.generate([list(range(40, 60))], max_new_tokens=4)


def test_another_model_in_mid_run_ends_it(folder, url, tmp_path):
    with faulty(url) as proxy:
        settings = {"top_logprobs": 20, "cache": str(tmp_path / "api.sqlite")}
        remote = over_http(folder, proxy.url, **settings)
        remote.generate(PROMPTS[:1], max_new_tokens=2)
        proxy.edit = lambda body, answer: answer | {"model": "a-fallback"}
        said = r"answered by the model 'tiny' before, and by 'a-fallback' now"
        with pytest.raises(UserError, match=said):
            remote.generate(PROMPTS, max_new_tokens=4)
        again = over_http(folder, proxy.url, **settings)  # the next run
        with pytest.raises(UserError, match=said):
            again.generate(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("marked", [True, False])
def test_a_server_of_another_vocabulary_is_refused(folder, url, marked):
    """Its text is not what the ids that it lists mean here; without a mark they are no texts."""

    def other(body, answer):
        for choice in answer["choices"]:
            choice["text"] = " Paris"
        for logprobs in [] if marked else lists_of(answer):
            logprobs["top_logprobs"] = [
                listed and {name.removeprefix("token_id:"): v for name, v in listed.items()}
                for listed in logprobs["top_logprobs"]
            ]
        return answer

    with (
        faulty(url, edit=other) as proxy,
        pytest.raises(UserError, match=r"another vocabulary: .* is .* to the triple, .*'Paris'"),
    ):
        over_http(folder, proxy.url, top_logprobs=20, endpoint="completions")


# -- what a server does by itself --------------------


def penalised(key: str):
    """Tokens of the prompt are less likely, unless the request says otherwise."""

    def edit(body, answer):
        for logprobs in [] if key in body else lists_of(answer):
            last = logprobs["top_logprobs"][-1]
            used = {f"token_id:{token}" for token in body["prompt"]}
            values = {name: v - 9.0 * (name in used) for name, v in last.items()}
            total = math.log(sum(map(math.exp, values.values())))
            logprobs["top_logprobs"][-1] = {name: v - total for name, v in values.items()}
        return answer

    return edit


@pytest.mark.parametrize("key", ["repetition_penalty", "presence_penalty"])
def test_a_penalty_of_the_server_s_own_is_asked_away(folder, url, key):
    others = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    with faulty(url, edit=penalised(key), drop=others) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=-1, blocks=False)
        assert offer_of(remote).sampling == "unfiltered"
        got = remote.generate(PROMPTS, max_new_tokens=8)
    want = in_process(folder).generate(PROMPTS, max_new_tokens=8)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]


# -- forms of lists --------------------


def objects(listed: dict[str, float], key: str) -> list[dict[str, Any]]:
    kind = str if key == "id" else int
    ids = {kind(name.removeprefix("token_id:")): value for name, value in listed.items()}
    return [{key: token, "token": "?", "logprob": value} for token, value in ids.items()]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("key", ["id", "token_id"])
def test_lists_of_objects(folder, url, key):
    def edit(body, answer):
        for logprobs in lists_of(answer):
            lists = logprobs["top_logprobs"]
            logprobs["top_logprobs"] = [listed and objects(listed, key) for listed in lists]
        return answer

    with faulty(url, edit=edit) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        assert offer_of(remote).endpoint == "completions"
        got = remote.generate(PROMPTS[:2], max_new_tokens=4)
    want = over_http(folder, url, top_logprobs=20).generate(PROMPTS[:2], max_new_tokens=4)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]


def test_a_token_that_stands_twice_in_a_list_counts_once():
    twice = [{"token": "a", "bytes": [97], "logprob": -0.5}] * 2
    ties = [{"token": "\ufffd", "logprob": -2.0}] * 2  # two tokens whose texts are incomplete
    assert len(named([*twice, *ties])) == 3


def test_names_of_no_token():
    assert [each.logprob for each in named({"a": {"logprob": -1.0, "rank": 1}, "b": None})] == [
        -1.0,
        None,
    ]
    with pytest.raises(Ended):
        generated({"logprobs": {"top_logprobs": []}, "finish_reason": "stop"})


def test_why_a_chat_endpoint_is_asked_is_said(folder, url):
    def refuses(body):
        return (400, {"error": {"message": "no completions here"}}) if "prompt" in body else None

    with faulty(url, early=refuses) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        with pytest.raises(UserError, match=r"first token.*no completions here"):
            remote.generate(PROMPTS, max_new_tokens=4)


def test_an_answer_without_choices_is_shown(folder, url):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, max_concurrency=1)
        proxy.early = lambda body: (200, {"status": "error", "reason": "no such deployment"})
        with pytest.raises(client_module.Unanswered, match="no such deployment"):
            remote.generate(PROMPTS[:1], max_new_tokens=3)


def test_a_wait_that_is_too_long_is_said(folder, url):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, retry_for_s=3)
        proxy.faults += [(429, "3600")] * 20
        with pytest.raises(client_module.Unanswered, match="asks to wait 3,600 seconds"):
            remote.generate(PROMPTS[:1], max_new_tokens=3)


def test_a_server_that_dies_of_a_request_is_not_asked_for_ten_minutes(folder, url):
    """Fails on fadf341: the probe went on for retry_for_s."""

    def dies(body, answer):
        raise ConnectionAbortedError  # the connection ends without an answer

    with (
        faulty(url, edit=dies) as proxy,
        pytest.raises(UserError, match=r"does not show the log-prob.*fails 2 times"),
    ):
        over_http(folder, proxy.url, top_logprobs=20, retry_for_s=600)
