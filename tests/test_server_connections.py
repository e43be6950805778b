"""Connections that wait, readers that stop, and the server's end.

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
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from proxytune.engine.loop import DecodeLoop
from proxytune.server import Server, ServerSettings, create_app
from proxytune.server import connections as limits
from proxytune.server import worker as worker_module
from tests.raw_http import BAN, ask, completion, connect, message, read_all
from tests.serving import running
from tests.test_server_limits import single, slow_down, triple, wait_until


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


@pytest.mark.thinned(1)
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


@pytest.mark.slow
def test_a_half_sent_header_is_answered_with_the_reason(short_waits):
    with running(create_app(single())) as url, connect(url) as slow:
        slow.sendall(HALVES["half a header"])
        assert read_all(slow).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
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


@pytest.mark.thinned(1)
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


# -- readers that stop --------------------


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_loop_goes_on_with_the_same_tokens_after_a_pause():
    """Rows that run, that wait, and samples that have not begun."""

    def run(pauses: bool) -> dict:
        generator = triple()
        loop = generator.loop(3)
        assert isinstance(loop, DecodeLoop)
        settings = {"max_new_tokens": 12, "temperature": 1.0, "n": 3}
        from proxytune.records import make_decoding

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


@pytest.mark.slow
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


@pytest.mark.slow
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
