"""A small OpenAI-compatible server for tests: the real protocol, with faults on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (status, headers) of a fault
Fault = tuple[int, dict[str, str]]


@dataclass
class FakeOpenAI:
    """What the server does and what it saw.

    Attributes:
        answer: the request's body -> the first choice's message content, or a whole choice,
            or (status, a whole body).
        faults: given to the first requests, one each.
        broken_from: number of the request from which every one fails with 500.
        requests: the bodies of all requests.
        refused: how many requests got a fault.
    """

    answer: Callable[[dict[str, Any]], str | dict[str, Any]]
    faults: list[Fault] = field(default_factory=list)
    broken_from: int | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def openai_server(
    answer: Callable[[dict[str, Any]], Any], **behaviour: Any
) -> Iterator[FakeOpenAI]:
    """Serves /v1/chat/completions on a free local port until the block ends."""
    state = FakeOpenAI(answer, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body)
                state.keys.add(self.headers.get("Authorization", ""))
                fault = state.faults.pop(0) if state.faults else None
                if state.broken_from is not None and len(state.requests) >= state.broken_from:
                    fault = (500, {})
                state.refused += fault is not None
            if self.path != "/v1/chat/completions":
                fault = (404, {})
            if fault is not None:
                self.reply(fault[0], {"error": {"message": "injected", "type": "fault"}}, fault[1])
                return
            choice = state.answer(body)
            if isinstance(choice, tuple):  # (status, the whole body)
                self.reply(*choice, {})
                return
            if isinstance(choice, str):
                choice = {"message": {"role": "assistant", "content": choice}}
            whole = {"index": 0, "finish_reason": "stop", "logprobs": None} | choice
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self.reply(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [whole],
                    "usage": usage,
                },
                {},
            )

        def reply(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
