"""Hostile clients: half a request, silence, no reading, foreign names, and too much at once.

Where a comment does not say otherwise, each test fails on 538a493.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from proxytune.engine.loop import DecodeLoop
from proxytune.errors import UserError
from proxytune.server import Server, ServerSettings, create_app
from proxytune.server import connections as limits
from proxytune.server import worker as worker_module
from proxytune.server.hosts import Hosts
from tests.serving import running
from tests.test_server_limits import single, slow_down, triple, wait_until

BAN = {"2": -100}  # the end token: completions are as long as they may be


def connect(url: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 5)
    connection.settimeout(40)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def message(method: str, path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """A request as bytes; a header of value None is left out."""
    known: dict[str, str | None] = {"Host": "localhost", "Connection": "close"}
    if body:
        known |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in known.items() if value is not None]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1") + body


def ask(url: str, data: bytes) -> tuple[int, bytes]:
    """Sends bytes; the answer's status (0 without one) and body."""
    with connect(url) as connection:
        connection.sendall(data)
        answer = read_all(connection)
    status = re.match(rb"HTTP/1.1 (\d{3})", answer)
    return int(status[1]) if status else 0, answer.partition(b"\r\n\r\n")[2]


def completion(**more) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 2} | more).encode()


@pytest.fixture
def deaf(monkeypatch):
    """Connects a client whose connection holds a few kilobytes that nobody has read."""
    accept = limits.Listener.accept

    def small(self):
        connection, address = accept(self)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        return connection, address

    monkeypatch.setattr(limits.Listener, "accept", small)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(40)

        def ask(url: str, data: bytes) -> socket.socket:
            connection.connect(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
            connection.sendall(data)
            return connection

        yield ask


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
        "2130706433",
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


# -- connections that wait --------------------

HALVES = {
    "silent": b"",
    "half a line": b"GET /hea",
    "half a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
    "no empty line": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "the second request": message("GET", "/health", Connection="keep-alive") + b"GET /",
    "idle": message("GET", "/health", Connection="keep-alive"),
    "half a body": message("POST", "/v1/completions", b"{", Content_Length="100"),
    "chunks without end": message(
        "POST", "/v1/completions", b"1\r\n{\r\n", Content_Length=None, Transfer_Encoding="chunked"
    ),
    "a body that nobody reads": message("GET", "/health", b"{", Content_Length="100"),
    "a body of a foreign name": message("POST", "/v1/models", b"{", Host="x", Content_Length="9"),
    "waits for 100": message("POST", "/v1/x", b"", Content_Length="9", Expect="100-continue"),
}


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 1)
    monkeypatch.setattr(limits, "IDLE_SECONDS", 1)
    monkeypatch.setattr(limits, "BODY_SECONDS", 1)
    monkeypatch.setattr(limits, "_GRACE", 0)
    monkeypatch.setattr("proxytune.server.gate.BODY_SECONDS", 1)


@pytest.mark.parametrize("trickles", [False, True], ids=["stops", "trickles"])
def test_what_is_half_sent_is_closed(short_waits, trickles):
    """Whether the client stops there or goes on byte by byte."""
    with running(create_app(single())) as url, ExitStack() as stack:
        sent = {name: stack.enter_context(connect(url)) for name in HALVES}
        for name, data in HALVES.items():
            sent[name].sendall(data)
        ended = time.monotonic() + 6
        left = set(sent)
        while left and time.monotonic() < ended:
            for name in list(left):
                sent[name].setblocking(False)
                try:
                    if trickles and name not in ("silent", "idle"):
                        sent[name].send(b"1")
                    while part := sent[name].recv(1 << 16):
                        assert part
                    left.remove(name)  # an orderly end
                except BlockingIOError:
                    pass
                except OSError:
                    left.remove(name)
            time.sleep(0.1)
        assert not left
        assert requests.get(f"{url.removesuffix('/v1')}/health").ok


def test_a_half_sent_header_is_answered_with_the_reason(short_waits):
    with running(create_app(single())) as url, connect(url) as slow:
        slow.sendall(HALVES["half a header"])
        assert read_all(slow).startswith(b"HTTP/1.1 408")


def test_who_reads_nothing_is_cut_off(monkeypatch, deaf):
    """A whole answer is written at once; its reader has 30 seconds for each piece of it."""
    monkeypatch.setattr(limits, "WRITE_SECONDS", 1)
    app = create_app(single(), ServerSettings(max_logprobs=-1))
    body = completion(max_tokens=200, logprobs=-1, temperature=0, logit_bias=BAN)
    with running(app) as url:
        client = deaf(url, message("POST", "/v1/completions", body, Connection="keep-alive"))
        begin = client.recv(1000)
        server = server_of(app)
        wait_until(lambda: not server.server_state.connections)
        length = int(begin.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert length > 400_000 and len(begin + read_all(client)) < length


@pytest.mark.parametrize("kind", ["silent", "half a header", "half a body", "idle"])
def test_a_flood_of_connections_makes_room_for_new_ones(kind, caplog):
    """The issue's flood: 130 half-open connections and 120 descriptors burnt a core."""
    settings = ServerSettings(max_connections=20)
    with running(create_app(single(), settings)) as url, ExitStack() as stack:
        ours = files()
        flood = [stack.enter_context(connect(url)) for _ in range(130)]
        for each in flood:
            each.sendall(HALVES[kind])
        assert ask(url, message("GET", "/health")) == (200, b'{"status":"ok"}')
        # both ends are in this process
        wait_until(lambda: files() <= ours + 130 + 25)
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.3
        assert ask(url, message("POST", "/v1/completions", completion()))[0] == 200
    assert len(caplog.records) < 5


def test_when_all_connections_await_answers_new_ones_are_refused():
    app = create_app(single(), ServerSettings(max_connections=3))
    worker = slow_down(app)
    body = completion(max_tokens=300, logit_bias=BAN)
    with running(app) as url, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connect(url))
            connection.sendall(message("POST", "/v1/completions", body))
        wait_until(lambda: worker.jobs == 3)
        with connect(url) as refused:
            assert read_all(refused).startswith(b"HTTP/1.1 503")
        stack.close()
        wait_until(lambda: worker.jobs == 0)
        assert ask(url, message("GET", "/health"))[0] == 200


FILES = """
import resource, socket, sys
from proxytune.server import Server, create_app
from tests.test_server_limits import single
app = create_app(single())
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
server = Server(app, listener, f"port {port}")
if sys.argv[1] == "taken":  # by something else of this process, after the start
    server._listener.most = 1000
    used = len(__import__("os").listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, used + 20))
server.serve_forever()
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["120 files", "taken"])
def test_descriptors_that_run_out_cost_neither_time_nor_log(tmp_path, case):
    """130 half-open connections: on 538a493 a core and 1.5 MB of log per second."""
    command = [sys.executable, "-c", FILES, case.split()[0] if case == "taken" else "limit"]
    shell = (
        " ".join(["ulimit -n 120;", "exec", *map(repr, command[:2])]) + f" '{FILES}' {command[3]}"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", shell], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().split()[1]}/v1"
            with ExitStack() as stack:
                for _ in range(130):
                    stack.enter_context(connect(url)).sendall(HALVES["half a header"])
                before = cpu_seconds(process.pid)
                time.sleep(3)
                assert cpu_seconds(process.pid) - before < 0.5
            wait_until(lambda: ask(url, message("GET", "/health"))[0] == 200)
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "log").stat().st_size < 1000


def files() -> int:
    """Open descriptors of this process."""
    return len(list(Path("/dev/fd").iterdir()))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_pipelined_requests_are_answered_in_turn(url):
    """Holds on 538a493, too."""
    one = message("GET", "/health", Connection="keep-alive")
    last = message("GET", "/nothing")
    with connect(url) as connection:
        connection.sendall(one * 50 + last)
        answers = Counter(re.findall(rb"HTTP/1.1 (\d+)", read_all(connection)))
    assert answers == {b"200": 50, b"404": 1}


# -- readers that stop --------------------


def test_a_stream_that_nobody_reads_is_paused_and_goes_on_unchanged(monkeypatch, deaf):
    monkeypatch.setattr(worker_module, "PAUSE_ABOVE", 1000)
    monkeypatch.setattr(worker_module, "RESUME_BELOW", 300)
    app = create_app(triple())
    (served,) = app.state.models.values()
    body = {"prompt": "a b", "max_tokens": 150, "n": 3, "seed": 3, "logprobs": 20}
    body |= {"temperature": 1.0, "stream": True, "logit_bias": BAN}
    with running(app) as url:
        client = deaf(url, message("POST", "/v1/completions", json.dumps(body).encode()))
        wait_until(lambda: served.worker._loop.paused > 0, 30)
        assert served.worker.running == 0 and served.worker.waiting == 0
        (job,) = served.worker._open
        assert job.unread <= 1000 + 3 * 21 * 8  # a step writes a drafted block for each row
        # others are served meanwhile
        assert requests.post(f"{url}/completions", json={"prompt": "a"}).ok
        streamed = read_all(client)
        texts = dict.fromkeys(range(3), "")
        for line in re.findall(rb"data: (\{.*\})", streamed):
            for choice in json.loads(line)["choices"]:
                texts[choice["index"]] += choice["text"]
        body |= {"stream": False, "logprobs": None}
        whole = requests.post(f"{url}/completions", json=body).json()
    assert b"data: [DONE]" in streamed
    assert texts == {each["index"]: each["text"] for each in whole["choices"]}


def test_a_loop_goes_on_with_the_same_tokens_after_a_pause():
    """Rows that run, that wait, and samples that have not begun."""

    def run(pauses: bool) -> dict:
        generator = triple()
        loop = generator.loop(3)
        assert isinstance(loop, DecodeLoop)
        settings = {"max_new_tokens": 12, "temperature": 1.0, "n": 3}
        from proxytune.generator import make_decoding

        for request in generator.requests(["a", "b c", "d"], make_decoding(**settings), seed=5):
            loop.add(request)
        done, steps = [], 0
        while loop.busy or loop.paused:
            steps += 1
            if pauses and steps == 4:
                loop.pause([0, 2])
                assert loop.paused == 6 and all(r.request.index == 1 for r in loop.rows)
            if pauses and (steps == 9 or not loop.busy):
                loop.resume([0, 2])
                assert not loop.paused
            done += loop.step() if loop.busy else []
        return {(each.index, each.sample): each.token_ids for each in done}

    assert run(pauses=True) == run(pauses=False)


def test_a_paused_stream_is_dropped_with_its_client(monkeypatch, deaf):
    monkeypatch.setattr(worker_module, "PAUSE_ABOVE", 100)
    monkeypatch.setattr(limits, "WRITE_SECONDS", 1)
    pauses = []
    pause = DecodeLoop.pause
    monkeypatch.setattr(
        DecodeLoop, "pause", lambda loop, rows: (pauses.append(rows), pause(loop, rows))
    )
    app = create_app(single())
    (served,) = app.state.models.values()
    body = completion(max_tokens=450, n=4, logprobs=20, stream=True, logit_bias=BAN)
    with running(app) as url:
        deaf(url, message("POST", "/v1/completions", body))
        wait_until(lambda: bool(pauses), 30)
        wait_until(lambda: served.worker.jobs == 0, 20)  # WRITE_SECONDS are over
        wait_until(lambda: not served.worker._loop.paused and not served.worker._left)


# -- the end --------------------


def test_the_end_says_so_to_everybody():
    app = create_app(single())
    worker = slow_down(app, 0.1)
    body = completion(max_tokens=400, logit_bias=BAN)
    answers = {}
    with running(app) as url, ExitStack() as stack:

        def send(name: str, data: bytes) -> None:
            with connect(url) as connection:
                connection.sendall(data)
                answers[name] = read_all(connection)

        streams = completion(max_tokens=400, logit_bias=BAN, stream=True)
        short = completion(max_tokens=15, logit_bias=BAN)
        chat = json.dumps(
            {"messages": [{"role": "user", "content": "a"}], "stream": True, "logit_bias": BAN}
        ).encode()
        response = json.dumps({"input": "a", "stream": True, "logit_bias": BAN}).encode()
        asked = {
            "stream": ("/v1/completions", streams),
            "chat": ("/v1/chat/completions", chat),
            "response": ("/v1/responses", response),
            "whole": ("/v1/completions", body),
            "short": ("/v1/completions", short),
        }
        threads = [
            threading.Thread(target=send, args=(name, message("POST", path, data)))
            for name, (path, data) in asked.items()
        ]
        for thread in threads:
            thread.start()
        silent, half, kept = (stack.enter_context(connect(url)) for _ in range(3))
        half.sendall(HALVES["half a body"])
        kept.sendall(HALVES["idle"])
        first = b""
        while not first.endswith(b"}"):
            first += kept.recv(1000)
        assert first.startswith(b"HTTP/1.1 200")
        wait_until(lambda: worker.jobs == 5)
        server_of(app)._seconds = 3
        server_of(app).should_exit = True
        wait_until(app.state.closing.is_set)
        began = time.monotonic()
        late = requests.post(f"{url}/completions", json={"prompt": "a"})
        assert late.status_code == 503 and int(late.headers["Retry-After"]) > 0
        assert late.json()["error"]["code"] == "shutting_down"
        assert requests.get(f"{url.removesuffix('/v1')}/health").status_code == 503
        kept.sendall(HALVES["idle"])
        assert kept.recv(1000).startswith(b"HTTP/1.1 503")
        for thread in threads:
            thread.join(timeout=10)
        read_all(half)
        read_all(silent)
        assert time.monotonic() - began < 12
    for name in ("stream", "chat"):
        *_, last = re.findall(rb"data: (.*)\n", answers[name])
        assert json.loads(last)["error"]["message"].startswith("the server is shutting down")
        assert b"[DONE]" not in answers[name]
    assert b"event: error" in answers["response"].rpartition(b"response.output_text.delta")[2]
    assert answers["whole"].startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in title(answers)
    assert answers["short"].startswith(b"HTTP/1.1 200")
    assert not worker.alive


def title(answers: dict) -> bytes:
    return answers["whole"].replace(b"retry-after", b"Retry-After")


def server_of(app) -> Server:
    """The server that `running` has started for an app."""
    return next(each for each in SERVERS if each._app is app)


SERVERS: list[Server] = []


@pytest.fixture(autouse=True)
def remember_servers(monkeypatch):
    init = Server.__init__

    def remembered(self, *args, **kwargs):
        init(self, *args, **kwargs)
        SERVERS.append(self)

    monkeypatch.setattr(Server, "__init__", remembered)
    yield
    SERVERS.clear()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_in_order(number):
    command = [sys.executable, "-c", "from proxytune.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "triple=pocket", "port=0", "machine=cpu", "shutdown_timeout=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[3]
        body = completion(max_tokens=480, n=64, stream=True, logit_bias={"0": -100, "1": -100})
        with connect(url) as stream, connect(url) as deaf:
            for each in (stream, deaf):
                each.sendall(message("POST", "/v1/completions", body))
                each.recv(100)
            process.send_signal(number)
            assert b'"code":"shutting_down"' in read_all(stream) or process.wait(20) == 0
            _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert not err
    finally:
        process.kill()
        process.wait()


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
