"""Hostile requests: foreign names, odd forms of HTTP, and too much at once.

Where a comment does not say otherwise, each test fails on 538a493.
"""

import json
import re
import socket
import threading
import time
from collections import Counter
from typing import Any

import pytest
import requests

from proxytune.errors import UserError
from proxytune.server import ServerSettings, create_app
from proxytune.server.hosts import Hosts
from tests.raw_http import ask, completion, connect, message, read_all
from tests.serving import running
from tests.test_server_limits import triple


@pytest.fixture(scope="module")
def url():
    with running(create_app(triple(), ServerSettings(max_tokens=500))) as url:
        yield url


# -- names --------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",  # the issue's
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "evil.example@127.0.0.1",
        "127.0.0.1:80@evil.example",
        "192.168.1.7:8000",
        "x",
        "",
        "localhost:8000:9000",
        "localhost evil.example",
        "[::2]:8000",
        "3232235783",  # 192.168.1.7
        "\u0131ocalhost".encode().decode("latin-1"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/metrics", "/health", "/openapi.json"])
def test_a_foreign_name_is_not_answered(url, host, path):
    """DNS rebinding: to the browser these are the foreign page's own requests."""
    data = message("POST" if "v1" in path else "GET", path, completion(), Host=host)
    status, body = ask(url, data)
    assert status in (400, 421), body
    assert b"choices" not in body and b"proxytune_" not in body


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "LocalHost", "[::1]:8000", "[::1]", "localhost.", "a.localhost:1"]
)
def test_names_of_this_machine_are_answered(url, host):
    """Holds on 538a493, too."""
    assert ask(url, message("POST", "/v1/completions", completion(), Host=host))[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),  # the issue's
        ("null", 403),
        ("http://127.0.0.1:3000", 403),
        ("http://localhost:8000/", 403),
        ("http://localhost:8000@evil.example", 403),
        ("chrome-extension://abc", 403),
        ("file://", 403),
        ("http://[", 403),
        ("http://localhost:8000", 200),
        ("http://LOCALHOST:8000", 200),
    ],
)
def test_only_the_server_s_own_pages_may_ask(url, origin, status):
    data = message("POST", "/v1/completions", completion(), Host="localhost:8000", Origin=origin)
    assert ask(url, data)[0] == status


def test_two_origins_or_two_hosts_are_one_too_many(url):
    two = "http://localhost\r\nOrigin: http://evil.example"
    assert ask(url, message("GET", "/health", Origin=two))[0] == 403
    two = "localhost\r\nHost: evil.example"
    assert ask(url, message("GET", "/health", Host=two))[0] == 400


def test_a_request_that_names_its_host_in_its_first_line_is_refused(url):
    """RFC 9112, 3.2.2: the target's host replaces Host. It fails on no commit."""
    for target in ("http://evil.example/v1/models", "http://localhost/v1/models", "//v1/models"):
        assert ask(url, message("GET", target))[0] == 404
    assert ask(url, message("CONNECT", "evil.example:443"))[0] in (400, 404)


def test_http_1_0_has_no_host_and_websockets_are_not_spoken(url):
    assert ask(url, b"GET /health HTTP/1.0\r\n\r\n") == (200, b'{"status":"ok"}')
    assert ask(url, b"GET /health HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n")[0] == 403
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    headers: dict[str, Any] = upgrade | {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    data = message("GET", "/v1/completions", Host="evil.example", **headers)
    with connect(url) as connection:
        connection.sendall(data)
        assert connection.recv(100).startswith(b"HTTP/1.1 421")


LAN = "192.168.1.5"


@pytest.mark.parametrize(
    ("allowed", "host", "origins", "local", "status"),
    [
        ([], "192.168.1.5:8000", [], LAN, None),  # an address cannot be rebound
        ([], "[fe80::1]:8000", [], LAN, None),
        ([], socket.gethostname(), [], LAN, None),
        ([], "localhost:8000", [], LAN, None),  # a port that a container shows on its host
        ([], "gpu1.example.org", [], LAN, 421),
        (["gpu1.example.org"], "GPU1.example.org:8000", [], LAN, None),
        (["gpu1.example.org"], "gpu2.example.org", [], LAN, 421),
        (["gpu1.example.org"], "gpu1.example.org", ["https://gpu1.example.org"], LAN, None),
        (["gpu1.example.org"], "127.0.0.1:8000", ["https://gpu1.example.org"], "127.0.0.1", None),
        (["*"], "anything.example", [], "127.0.0.1", None),
        (["*"], "anything.example", ["http://evil.example"], "127.0.0.1", 403),
        ([], "192.168.1.5", [], "::1", 421),
        ([], "192.168.1.5", [], "::ffff:127.0.0.1", 421),
        ([], "evil.example", [], None, None),  # a Unix socket
    ],
)
def test_beyond_this_machine_addresses_and_allowed_names_are_answered(
    allowed, host, origins, local, status
):
    refusal = Hosts(allowed).refusal([host], origins, local)
    assert (refusal and refusal[0]) == status


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "", "a b", "[::1", "*.a.b"])
def test_a_name_that_is_none_is_refused_at_the_start(name):
    with pytest.raises(UserError, match="allowed_hosts"):
        ServerSettings(allowed_hosts=[name])


@pytest.mark.parametrize("key", ["", " ", "secret\n", "a b", "\tsecret"])
def test_a_key_that_no_request_can_send_is_refused_at_the_start(key):
    with pytest.raises(UserError, match="api_key"):
        ServerSettings(api_key=key)


def test_pipelined_requests_are_answered_in_turn(url):
    """Holds on 538a493, too."""
    one = message("GET", "/health", Connection="keep-alive")
    last = message("GET", "/nothing")
    with connect(url) as connection:
        connection.sendall(one * 50 + last)
        answers = Counter(re.findall(rb"HTTP/1.1 (\d+)", read_all(connection)))
    assert answers == {b"200": 50, b"404": 1}


# -- requests that ask too much --------------------

MANY = {
    "stops": {"stop": [f"s{i}" for i in range(200_000)]},
    "129 stops": {"stop": ["a"] * 129},
    "a long stop": {"stop": "x" * 1025},
    "biases": {"logit_bias": {str(i): 1 for i in range(5000)}},
    "fields": {f"field{i}": 1 for i in range(100_000)},
    "nulls": {"prompt": [None] * 500_000},
    "objects": {"prompt": [{}] * 500_000},
    "fractions": {"prompt": [0.5] * 500_000},
    "lists": {"prompt": [[]] * 500_000},
    "texts": {"prompt": ["a"] * 500_000},
    "text": {"prompt": "abc " * 750_000},
    "spaces": {"prompt": " " * 3_000_000},
    "no special": {"prompt": "abc " * 750_000, "add_special_tokens": False},
    "a long name": {"x" * 2_000_000: 1},
    "a long model": {"model": "m" * 2_000_000},
    "stop options": {"stream": True, "stream_options": {str(i): 1 for i in range(100_000)}},
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("change", MANY.values(), ids=MANY)
def test_too_much_is_refused_at_once_and_nobody_waits(url, change):
    """A body of 4 MB could stop the event loop for a minute and take gigabytes."""
    body = json.dumps({"prompt": "a"} | change).encode()
    began = time.process_time()
    status, answer = ask(url, message("POST", "/v1/completions", body))
    assert time.process_time() - began < 3
    assert status in (400, 404), answer[:300]
    assert len(answer) < 1000 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stop": ["a"] * 129}, "stop: 129 stop strings are more than the 128"),
        ({"stop": "x" * 1025}, "1024 characters"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "4097 tokens are more than the 4096"),
        ({"prompt": "abc " * 750_000}, "3,000,000 characters"),
    ],
)
def test_the_refusal_names_the_limit(url, change, said):
    answer = requests.post(f"{url}/completions", json={"prompt": "a"} | change)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_conversations_have_limits_too(url):
    turn = {"role": "user", "content": "a"}
    for messages in (
        [turn] * 5000,
        [{}] * 100_000,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}],
        [{"role": "user", "content": "abc " * 750_000}],
    ):
        answer = requests.post(f"{url}/chat/completions", json={"messages": messages})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        answer = requests.post(f"{url}/responses", json={"input": messages})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"


def test_as_many_as_allowed_are_taken(url):
    """Holds on 538a493, too."""
    stop = ["z" * 1000 + str(i) for i in range(128)]
    bias = {str(i): 0.5 for i in range(300)}
    body = {"prompt": "a", "stop": stop, "logit_bias": bias, "max_tokens": 4}
    assert requests.post(f"{url}/completions", json=body).ok


@pytest.mark.thinned(1)
def test_a_long_prompt_does_not_hold_up_short_ones(monkeypatch, url):
    """Two threads encode: what takes seconds waits for its own kind alone."""
    import proxytune.server.app as app_module

    prepare = app_module.prepare_completion
    encoding = threading.Event()
    goes_on = threading.Event()

    def slow(body, *rest):
        if len(str(body.prompt)) > 1000:
            encoding.set()
            assert goes_on.wait(10)
        return prepare(body, *rest)

    monkeypatch.setattr(app_module, "prepare_completion", slow)
    long = message("POST", "/v1/completions", completion(prompt="a" * 100_000))
    with connect(url) as waiting:
        waiting.sendall(long)
        assert encoding.wait(10)
        assert requests.post(f"{url}/completions", json={"prompt": "a"}, timeout=5).ok
        goes_on.set()
        assert b"HTTP/1.1" in read_all(waiting)
