"""A proxy in front of a real server, with faults on demand and a record of what got through."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Faulty:
    """What the proxy does, and what it saw.

    Attributes:
        upstream: the real server's base URL.
        faults: one for each of the next completions: an HTTP status, (status, Retry-After), "cut"
            (half an answer), "malformed", "empty" (no choices), "slow" (seconds: `slowness`), or
            None (no fault).
        early: body -> (status, answer) in place of the real server's; None asks that.
        edit: (body, the real answer) -> the answer.
        drop: body keys that the real server does not get.
        refuse: body keys that are answered with 400, as a server does that lacks them.
        delivered: bodies of the completions whose answers reached the client whole.
        asked: bodies of all requests.
        hits: how many completions were asked for, faulty ones included.
    """

    upstream: str
    faults: list[Any] = field(default_factory=list)
    early: Callable[[dict[str, Any]], tuple[int, Any] | None] | None = None
    edit: Callable[[dict[str, Any], dict[str, Any]], Any] | None = None
    drop: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    slowness: float = 1.0
    delivered: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    hits: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """The proxy's base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listens, on the port of before where there was one."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stops listening; clients are refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts of the answers that got through, in their order."""
        return [tuple(body["prompt"]) for body in self.delivered]


@contextmanager
def faulty(upstream: str, **behaviour: Any) -> Iterator[Faulty]:
    """Runs a proxy until the block ends."""
    proxy = Faulty(upstream, **behaviour)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _handler(proxy: Faulty) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(*self.forward("GET", None))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw)
            with proxy.lock:
                proxy.asked.append(body)
            lacking = [key for key in proxy.refuse if key in body]
            if lacking:
                self.reply(400, _error(f"unknown argument {lacking[0]}"))
                return
            with proxy.lock:
                proxy.hits += 1
                fault = proxy.faults.pop(0) if proxy.faults else None
            if isinstance(fault, int | tuple):
                status, after = fault if isinstance(fault, tuple) else (fault, None)
                self.reply(
                    status, _error("injected"), {} if after is None else {"Retry-After": after}
                )
                return
            early = proxy.early(body) if proxy.early else None
            if early is not None:
                self.reply(early[0], json.dumps(early[1]).encode())
                return
            if proxy.drop:
                raw = json.dumps({k: v for k, v in body.items() if k not in proxy.drop}).encode()
            status, answer = self.forward("POST", raw)
            if proxy.edit is not None and status == 200:
                answer = json.dumps(proxy.edit(body, json.loads(answer))).encode()
            if fault == "slow":
                time.sleep(proxy.slowness)
            if fault == "malformed":
                answer = answer[: len(answer) // 2]
            if fault == "empty":
                answer = b'{"choices": []}'
            if fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer[: len(answer) // 2])
                self.close_connection = True
                return
            if fault is None and status == 200:
                with proxy.lock:
                    proxy.delivered.append(body)
            self.reply(status, answer)

        def forward(self, method: str, raw: bytes | None) -> tuple[int, bytes]:
            target = urlsplit(proxy.upstream)
            connection = http.client.HTTPConnection(str(target.hostname), target.port)
            path = target.path.removesuffix("/v1") + self.path
            keys = ("Authorization", "Content-Type")
            headers = {key: self.headers[key] for key in keys if key in self.headers}
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, data

        def reply(self, status: int, data: bytes, more: dict[str, Any] | None = None) -> None:
            try:
                self.send_response(status)
                for key, value in (more or {}).items():
                    self.send_header(key, str(value))
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # the client would not wait for a slow answer
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    return Handler


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "fault"}}).encode()
