"""What the server refuses, and that it lives on: mistakes, floods, clients that leave."""

import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from hypothesis import given, settings

from proxytune import api
from proxytune.engine.score import prompt_logprobs
from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer


def single() -> api.Generator:
    return api.load(tiny_model(seed=0), tokenizer=tiny_tokenizer())


def triple() -> api.Generator:
    models = [tiny_model(seed=0), tiny_model(seed=1, hidden=16), tiny_model(seed=2, hidden=16)]
    return api.load(*models, tokenizer=tiny_tokenizer())


def slow_down(app, seconds: float = 0.02):
    """Makes every decoding step of the app's model take longer; returns its worker."""
    (served,) = app.state.models.values()
    step = served.worker._loop.step

    def slow_step():
        time.sleep(seconds)
        return step()

    served.worker._loop.step = slow_step
    return served.worker


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url():
    with running(create_app(single())) as url:
        yield url


def refused(response: requests.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# -- mistakes --------------------


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 10**6}, "n", "512 completions"),
        ({"n": 10**30}, "n", ""),
        ({"best_of": 3}, "best_of", "must equal n=1"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"max_tokens": -2}, "max_tokens", ""),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"logprobs": 21}, "logprobs", "max_logprobs=20"),
        ({"logprobs": -1}, "logprobs", "max_logprobs=20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "max_logprobs=20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "without stream"),
        ({"alpha": 0.5}, "alpha", "needs a triple"),
        ({"stop": ""}, "stop", ""),
        ({"stop": ["a", ""]}, "stop", ""),
        ({"logit_bias": {"5": 101}}, "logit_bias", ""),
        ({"logit_bias": {"five": 1}}, "logit_bias", ""),
        ({"logit_bias": {"300": 1}}, "logit_bias", "vocabulary of 300"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": ["a"] * 600}, "prompt", "512 completions"),
        ({"prompt": [5, 300]}, "prompt", "token id 300"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": "a " * 600}, "prompt", "the models read at most 512"),
        ({"prompt": "a\ud800"}, "prompt", "string"),
        ({"prompt": None}, "prompt", ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_named(url, change, param, said):
    error = refused(requests.post(f"{url}/completions", json={"prompt": "a"} | change), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, None),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 700}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": "a"}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_in_a_conversation_is_named(url, change, param):
    body = {"messages": [{"role": "user", "content": "a"}]} | change
    response = requests.post(f"{url}/chat/completions", json=body)
    if param is None:  # the assistant's turn alone is the beginning of its answer, for a raw model
        assert response.status_code == 200
    else:
        assert refused(response, 400)["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"[" * 100_000, b"\xff\xfe", b'{"a":NaN}']
)
def test_a_body_that_is_no_json_object_is_refused(url, body):
    headers = {"Content-Type": "application/json"}
    refused(requests.post(f"{url}/completions", data=body, headers=headers), 400)


def test_a_form_from_a_foreign_web_page_is_refused(url):
    """Browsers send text/plain to anybody without asking; JSON only where the server agrees."""
    response = requests.post(
        f"{url}/completions", data=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert "application/json" in refused(response, 400)["message"]
    assert "access-control-allow-origin" not in response.headers


def test_what_is_not_there(url):
    error = refused(requests.post(f"{url}/completions", json={"prompt": "a", "model": "gpt"}), 404)
    assert error["code"] == "model_not_found"
    refused(requests.get(f"{url}/models/gpt"), 404)
    refused(requests.get(f"{url}/nothing"), 404)
    refused(requests.get(f"{url}/completions"), 405)


def test_a_prompt_as_long_as_the_context_can_be_rated_but_not_continued(url):
    ids = [5] * 512
    rated = requests.post(
        f"{url}/completions", json={"prompt": ids, "max_tokens": 0, "prompt_logprobs": 0}
    )
    assert len(rated.json()["choices"][0]["prompt_logprobs"]) == 512
    refused(requests.post(f"{url}/completions", json={"prompt": ids, "max_tokens": 1}), 400)
    last = requests.post(
        f"{url}/completions", json={"prompt": ids[1:], "max_tokens": 9, "temperature": 0}
    ).json()
    assert last["usage"]["completion_tokens"] == 1
    too_long = {"prompt": [5] * 513, "max_tokens": 0, "prompt_logprobs": 0}
    refused(requests.post(f"{url}/completions", json=too_long), 400)


def test_the_smallest_numbers_are_greedy(url):
    body = {"prompt": "a", "logprobs": 0}
    greedy = requests.post(f"{url}/completions", json=body | {"temperature": 0}).json()
    for tiny in ({"top_p": 5e-324}, {"temperature": 5e-324}, {"top_k": 1}):
        answer = requests.post(f"{url}/completions", json=body | tiny).json()
        assert answer["choices"][0]["text"] == greedy["choices"][0]["text"]


# -- limits --------------------


def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_its_length(url):
    big = json.dumps({"prompt": "x" * 10_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    refused(requests.post(f"{url}/completions", data=big, headers=headers), 413)
    chunks = (big[i : i + 65536] for i in range(0, len(big), 65536))
    refused(requests.post(f"{url}/completions", data=chunks, headers=headers), 413)
    assert requests.post(f"{url}/completions", json={"prompt": "a"}).ok


def test_a_body_that_does_not_arrive_is_refused(url, monkeypatch):
    monkeypatch.setattr("proxytune.server.gate.BODY_SECONDS", 0.2)
    port = int(url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        slow.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt":'.encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_key_is_asked_for():
    with running(create_app(single(), ServerSettings(api_key="secret"))) as url:
        for key in (None, "Bearer wrong", "secret", "Bearer secret "[:-2], "Bearer s\u00e9"):
            headers = {} if key is None else {"Authorization": key.encode("latin-1")}
            for path in ("models", "completions", "nothing"):
                refused(requests.post(f"{url}/{path}", json={"prompt": "a"}, headers=headers), 401)
        for key in ("Bearer secret", "bearer secret", "Bearer  secret "):
            assert requests.get(f"{url}/models", headers={"Authorization": key.encode()}).ok
        assert requests.get(f"{url.removesuffix('/v1')}/health").ok


def test_a_weaker_server_can_be_imitated():
    limits = ServerSettings(prompt_logprobs=False, max_logprobs=2, max_tokens=5)
    with running(create_app(single(), limits)) as url:

        def ask(**body):
            return requests.post(f"{url}/completions", json={"prompt": "a"} | body)

        assert refused(ask(prompt_logprobs=0), 400)["param"] == "prompt_logprobs"
        assert refused(ask(echo=True, logprobs=0), 400)["param"] == "echo"
        assert ask(echo=True).ok and ask(logprobs=2).ok
        refused(ask(logprobs=3), 400)
        refused(ask(max_tokens=6), 400)
        assert ask().json()["usage"]["completion_tokens"] <= 5  # the default is 16
        chat = {"messages": [{"role": "user", "content": "a"}], "temperature": 0}
        answer = requests.post(f"{url}/chat/completions", json=chat).json()
        assert answer["usage"]["completion_tokens"] == 5
    with running(create_app(single(), ServerSettings(chat_only=True))) as url:
        refused(requests.post(f"{url}/completions", json={"prompt": "a"}), 404)
        assert requests.post(f"{url}/chat/completions", json=chat | {"max_tokens": 2}).ok


@pytest.mark.slow
def test_when_too_much_waits_clients_are_told_to_come_again():
    app = create_app(single(), ServerSettings(max_waiting=3), batch_size=2)
    worker = slow_down(app)
    body = {"prompt": "a", "max_tokens": 20, "temperature": 0, "n": 2, "logit_bias": {"2": -100}}
    with running(app) as url, ThreadPoolExecutor(8) as pool:
        first = [pool.submit(requests.post, f"{url}/completions", json=body) for _ in range(2)]
        wait_until(lambda: worker.running == 2 and worker.waiting == 2)
        first.append(pool.submit(requests.post, f"{url}/completions", json=body))
        wait_until(lambda: worker.waiting == 4)
        response = requests.post(f"{url}/completions", json=body)
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) >= 1
        streamed = requests.post(f"{url}/completions", json=body | {"stream": True})
        refused(streamed, 429)
        assert all(each.result().ok for each in first)
        assert requests.post(f"{url}/completions", json=body | {"max_tokens": 1}).ok


def test_a_request_that_takes_too_long_is_ended():
    app = create_app(single(), ServerSettings(timeout=0.3))
    worker = slow_down(app)
    body = {"prompt": "a", "max_tokens": 400, "temperature": 0, "logit_bias": {"2": -100}}
    with running(app) as url:
        refused(requests.post(f"{url}/completions", json=body), 504)
        stream = requests.post(f"{url}/completions", json=body | {"stream": True})
        *pieces, last = [line for line in stream.iter_lines() if line]
        assert (
            pieces and "longer than" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
        )
        wait_until(lambda: worker.running == 0 and worker.waiting == 0)
        assert requests.post(f"{url}/completions", json=body | {"max_tokens": 2}).ok


# -- clients that leave, workers that fail --------------------


def raw_request(url: str, body: dict) -> socket.socket:
    """Sends a request and leaves the answer to the caller."""
    port = int(url.split(":")[2].split("/")[0])
    connection = socket.create_connection(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
def test_the_rows_of_a_client_that_leaves_become_free(stream):
    app = create_app(triple())
    worker = slow_down(app)
    alone = triple().generate(["b"], max_new_tokens=40, seed=1, temperature=1.0)[0].text
    body = {"prompt": "a", "max_tokens": 450, "n": 3, "logit_bias": {"2": -100}, "stream": stream}
    with running(app) as url, ThreadPoolExecutor(1) as pool:
        leaving = raw_request(url, body)
        wait_until(lambda: worker.running == 3)
        staying = {"prompt": "b", "max_tokens": 40, "seed": 1, "temperature": 1.0}
        stays = pool.submit(requests.post, f"{url}/completions", json=staying)
        wait_until(lambda: worker.running == 4)
        leaving.close()
        wait_until(lambda: worker.running <= 1)
        assert stays.result().json()["choices"][0]["text"] == alone
        wait_until(lambda: worker.waiting == 0 and not worker._jobs and not worker._left)


def test_a_failing_worker_tells_its_clients_and_goes_on(caplog):
    app = create_app(single())
    (served,) = app.state.models.values()
    step, failures = served.worker._loop.step, [ZeroDivisionError("a bug")]

    def fails_once():
        if failures:
            raise failures.pop()
        return step()

    served.worker._loop.step = fails_once
    with running(app) as url:
        refused(requests.post(f"{url}/completions", json={"prompt": "a"}), 500)
        assert "a bug" in caplog.text
        assert requests.post(f"{url}/completions", json={"prompt": "a"}).ok
        assert requests.get(f"{url.removesuffix('/v1')}/health").ok


def test_health_tells_of_a_worker_that_has_ended():
    app = create_app(single())
    (served,) = app.state.models.values()
    with running(app) as url:
        served.worker.close()
        assert requests.get(f"{url.removesuffix('/v1')}/health").status_code == 503
        refused(requests.post(f"{url}/completions", json={"prompt": "a"}), 500)


def test_prompts_are_rated_in_smaller_passes_when_memory_runs_out(monkeypatch):
    app = create_app(single())
    (served,) = app.state.models.values()
    passes = []

    def limited(system, prompts, alphas, tops):
        passes.append(len(prompts))
        if len(prompts) > 2:
            raise MemoryError
        return prompt_logprobs(system, prompts, alphas, tops)

    monkeypatch.setattr("proxytune.engine.score.prompt_logprobs", limited)
    served.worker._rated_tokens = 40
    body = {"prompt": [[5, 6, 7]] * 12, "max_tokens": 0, "prompt_logprobs": 0}
    with running(app) as url:
        choices = requests.post(f"{url}/completions", json=body).json()["choices"]
    assert len(choices) == 12
    assert all(choice["prompt_logprobs"] == choices[0]["prompt_logprobs"] for choice in choices)
    assert passes[0] == 12 and passes[-1] <= 2


@pytest.mark.thinned(1)
def test_requests_under_way_end_with_the_server():
    app = create_app(single())
    slow_down(app)
    body = {"prompt": "a", "max_tokens": 400, "temperature": 0, "logit_bias": {"2": -100}}
    with running(app) as url:
        thread = threading.Thread(
            target=requests.post, args=(f"{url}/completions",), kwargs={"json": body}
        )
        thread.start()
        (served,) = app.state.models.values()
        wait_until(lambda: served.worker.running == 1)
    thread.join(timeout=5)
    assert not thread.is_alive() and not served.worker.alive


# -- hostile requests by the thousand --------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_what_schemathesis_makes_up_from_the_openapi_document(mode):
    """Bodies that fit the document and bodies that do not: an answer as documented, never a 500."""
    import schemathesis  # here, for it takes two seconds of every test process
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as of_document

    mode = schemathesis.GenerationMode(mode)
    checks = [
        not_a_server_error,
        of_document.status_code_conformance,
        of_document.content_type_conformance,
        of_document.response_schema_conformance,
        of_document.negative_data_rejection,
    ]
    limits = ServerSettings(max_tokens=8, max_completions=8)
    with running(create_app(triple(), limits)) as url:
        root = url.removesuffix("/v1")
        schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
        statuses = Counter()
        for result in schema.get_all_operations():
            operation = result.ok()
            if mode.is_negative and operation.method == "get":
                continue  # they take nothing that could be wrong

            @settings(max_examples=15, deadline=None, derandomize=True, database=None)
            @given(operation.as_strategy(mode))
            def attack(case):
                response = case.call_and_validate(base_url=root, checks=checks)
                statuses[response.status_code] += 1
                if mode.is_positive and isinstance(case.body, dict):
                    # without these most of them are answered rather than refused
                    for name in ("model", "n", "best_of", "max_tokens", "logit_bias"):
                        case.body.pop(name, None)
                    response = case.call_and_validate(base_url=root, checks=checks)
                    statuses[response.status_code] += 1

            attack()
        assert statuses[400] > 10
        assert mode.is_negative or statuses[200] > 10
        assert requests.post(f"{url}/completions", json={"prompt": "a"}).ok
