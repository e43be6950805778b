"""120 odd request bodies: each is answered, or refused by a message; none is a 500.

They were tried on 538a493, which lost nothing by them; the tests hold it so.
"""

import json
from typing import Any

import pytest
import requests

from proxytune.server import create_app
from tests.serving import running
from tests.test_server_limits import triple

COMPLETIONS, CHAT = "completions", "chat/completions"
IS_JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def url():
    with running(create_app(triple())) as url:
        yield url


def field(text: str) -> bytes:
    """A body whose further field is written as it stands."""
    return f'{{"prompt":"a","max_tokens":2,{text}}}'.encode()


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}], "max_tokens": 2}


RAW: dict[str, tuple[bytes, int]] = {
    "truncated": (b'{"prompt": "a"', 400),
    "empty": (b"", 400),
    "white": (b" \n", 400),
    "null": (b"null", 400),
    "a text": (b'"prompt"', 400),
    "two objects": (b'{"prompt":"a"}{"prompt":"b"}', 400),
    "no utf-8": (b'{"prompt":"\xff\xfe"}', 400),
    "utf-16": ('{"prompt":"a"}'.encode("utf-16"), 200),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt":"a"}', 200),
    "deep arrays": (b"[" * 100_000, 400),
    "deep objects": (b'{"a":' * 100_000, 400),
    "deep prompt": (b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    "deep metadata": (field('"metadata":' + "[" * 500 + "]" * 500), 200),
    "one key twice": (b'{"prompt":"a","prompt":"b","max_tokens":1}', 200),
    "NaN": (field('"temperature":NaN'), 400),
    "infinite": (field('"temperature":Infinity'), 400),
    "infinite alpha": (field('"alpha":-Infinity'), 400),
    "NaN alpha": (field('"alpha":NaN'), 400),
    "1e400": (field('"alpha":1e400'), 400),
    "5000 digits": (field('"alpha":' + "9" * 5000), 400),
    "5000 digits of a seed": (field('"seed":' + "9" * 5000), 400),
    "4000 digits of n": (field('"n":' + "9" * 4000), 400),
    "a surrogate": (b'{"prompt":"\\ud800 abc","max_tokens":2}', 400),
    "a raw surrogate": (b'{"prompt":"\xed\xa0\x80"}', 400),
    "a surrogate to stop": (field('"stop":"\\ud800"'), 400),
    "a surrogate as model": (field('"model":"\\ud800"'), 404),
    "a surrogate as key": (field('"\\ud800":1'), 400),
    "a surrogate as user": (field('"user":"\\udfff"'), 200),
    "NaN bias": (field('"logit_bias":{"1":NaN}'), 400),
}
# what a completion's body has besides prompt and max_tokens -> the status
FIELDS: list[tuple[dict[str, Any], int]] = [
    *(({"alpha": alpha, "temperature": 0}, 200) for alpha in (100, -100, 1e-320, None, 0, -0.0)),
    *(({"alpha": alpha}, 400) for alpha in (101, 1e308, True, "1", [])),
    *(({"prompt": [1, token]}, 400) for token in (-1, 10**9, 2**63, True, 1.5, None, "3", [])),
    *(({"prompt": prompt}, 400) for prompt in ([True, 1], ["a", [1]], [[1], "a"], [], [[]], {})),
    *(({"prompt": prompt}, 400) for prompt in (5, True, None, [[[1]]], [[1], [None]], [300])),
    *(
        ({"prompt": prompt}, 200)
        for prompt in ([[5, 6], [7]], "a\0b", [" ", "a"], "\u0300\U0001f600")
    ),
    ({"prompt": "", "echo": True, "logprobs": 1}, 400),  # the tiny tokenizer has no BOS
    ({"prompt": ["a"] * 513}, 400),
    ({"prompt": ["a", "b"], "n": 512}, 400),
    *(({"n": n}, 400) for n in (0, -1, True, 10**9, 2**31, 1.5, "2")),
    ({"best_of": 3}, 400),
    *(({"max_tokens": most}, 400) for most in (-2, 0, 2**31, 10**30, "2", [2], 1.5)),
    *(({"max_tokens": most}, 200) for most in (2**31 - 1, None, -1)),
    *(({"logit_bias": bias}, 200) for bias in ({"0": 100}, {"00005": 50}, {}, None)),
    *(({"logit_bias": bias}, 400) for bias in ({"5": 1e308}, {"-1": 1}, {"999": 1}, {"a": 1})),
    *(
        ({"logit_bias": bias}, 400)
        for bias in ({"1": "x"}, {"": 1}, {"1.0": 1}, [1], "5", {"1": {}})
    ),
    ({"logit_bias": {str(token): -100 for token in range(300)}}, 200),
    *(({"seed": seed}, 200) for seed in (2**63 - 1, -(2**63), 0, -1)),
    *(({"seed": seed}, 400) for seed in (2**63, "1", True, 1.5)),
    *(({"temperature": t}, 200) for t in (100, 1e-5, 1e-4, -0.0, 5e-324)),
    *(({"temperature": t}, 400) for t in (101, -1e-9, "1", True, {})),
    *(({"top_p": p}, 400) for p in (1.1, "1", -0.5)),
    *(({"top_k": k}, status) for k, status in ((2**31 - 1, 200), (-1, 200), (-2, 400), (1.5, 400))),
    *(({"stop": stop}, 400) for stop in ("", [""], [None], 5, {"a": 1}, ["a"] * 200, "x" * 10**6)),
    *(({"logprobs": k}, status) for k, status in ((20, 200), (0, 200), (-1, 400), (21, 400))),
    ({"prompt_logprobs": 1, "stream": True}, 400),
    ({"prompt_logprobs": 0}, 200),
    ({"stream_options": {"include_usage": True}}, 400),
    ({"stream": True, "stream_options": {"a": 1}}, 400),
    ({"stream": "yes"}, 400),
    ({"foo": 1}, 400),
    ({"<script>alert(1)</script>": 1}, 400),
    ({"__class__": 1}, 400),
    ({"model": "../../etc/passwd"}, 404),
    ({"model": ""}, 404),
    ({"model": 5}, 400),
]
TURNS: list[tuple[dict[str, Any], int]] = [
    (turn("tool", "a"), 400),
    (turn("user", ""), 400),
    (turn("user", None), 400),
    (turn("user", []), 400),
    (turn("user", [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400),
    (turn("user", "{{ 7*7 }}{% raw %}"), 200),
    (turn("assistant", "a"), 200),
    (turn("user", "a") | {"max_completion_tokens": 0}, 400),
    ({"messages": []}, 400),
    ({"messages": "a"}, 400),
    ({"messages": [[]]}, 400),
    ({"messages": [turn("user", "a")] * 10_000}, 400),
    ({"messages": {"role": "user", "content": "a"}}, 400),
]


def check(response: requests.Response, status: int) -> None:
    assert response.status_code == status, response.text[:500]
    if status != 200:
        error = response.json()["error"]
        assert error["message"] and len(response.text) < 2000
        assert "Traceback" not in response.text


@pytest.mark.parametrize(("body", "status"), RAW.values(), ids=RAW)
def test_bodies_that_are_hardly_json(url, body, status):
    check(requests.post(f"{url}/{COMPLETIONS}", data=body, headers=IS_JSON), status)
    assert requests.get(f"{url.removesuffix('/v1')}/health").ok


@pytest.mark.parametrize("body", [b"[" * 100_000, field('"seed":' + "9" * 5000), b'"\xff"'])
def test_what_json_cannot_be_is_said(url, body):
    error = requests.post(f"{url}/{COMPLETIONS}", data=body, headers=IS_JSON).json()["error"]
    assert "nested too deeply" in error["message"]


def test_there_are_enough():
    assert len(RAW) + len(FIELDS) + len(TURNS) >= 120


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("change", "status"),
    FIELDS,
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_fields_of_odd_values(url, change, status):
    body = json.dumps({"prompt": "a", "max_tokens": 2} | change)
    check(requests.post(f"{url}/{COMPLETIONS}", data=body, headers=IS_JSON), status)


@pytest.mark.parametrize(("body", "status"), TURNS, ids=lambda value: str(value)[:40])
def test_conversations_of_odd_turns(url, body, status):
    check(requests.post(f"{url}/{CHAT}", json=body), status)
    assert requests.get(f"{url.removesuffix('/v1')}/health").ok


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("", 400),
        ("application/vnd.x+json", 200),
        ("application/json; charset=utf-16", 200),
    ],
)
def test_content_types(url, kind, status):
    body = b'{"prompt":"a","max_tokens":2}'
    check(requests.post(f"{url}/{COMPLETIONS}", data=body, headers={"Content-Type": kind}), status)
