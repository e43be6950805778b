"""Checks of every request before any route sees it (name, key, size, time), and the metrics."""

import asyncio
import hmac
import threading
import time
from collections import defaultdict
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.server.errors import PlainJson, ending, error_response
from proxytune.server.hosts import Hosts
from proxytune.server.settings import ServerSettings
from proxytune.server.worker import Worker

BODY_SECONDS = 60  # a body that has not arrived by then is refused
DRAINED = 16  # a body over the limit is read up to this many times the limit, then answered


class Metrics:
    """Prometheus metrics of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "proxytune_requests", "HTTP requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "proxytune_request_seconds",
            "Time from a request's arrival to the end of its answer",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.prompt_tokens = self._tokens("prompt", "Tokens of prompts that were accepted")
        self.generated_tokens = self._tokens("generated", "Tokens that were generated")
        self._running = self._gauge("running_rows", "Completions that are being written")
        self._waiting = self._gauge("waiting", "Completions that wait for a row")

    def _tokens(self, kind: str, text: str) -> Counter:
        return Counter(f"proxytune_{kind}_tokens", text, ["model"], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"proxytune_{name}", text, ["model"], registry=self.registry)

    def watch(self, model: str, worker: Worker) -> None:
        """Lets the gauges of a model follow its worker."""
        self._running.labels(model).set_function(lambda: worker.running)
        self._waiting.labels(model).set_function(lambda: worker.waiting)


class Gate:
    """The ASGI middleware around all routes.

    Args:
        app: the app that gets the requests which pass.
        paths: the routes, for the metrics' labels.
        metrics: counts every request.
        settings: the key that paths under /v1 need, the names, and the limit on a body.
        closing: set once the server is about to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: frozenset[str],
        metrics: Metrics,
        settings: ServerSettings,
        closing: threading.Event,
    ) -> None:
        self.app = app
        self._paths = paths
        self._metrics = metrics
        self._hosts = Hosts(settings.allowed_hosts)
        key = settings.api_key
        self._key = None if key is None else key.encode(errors="surrogateescape")
        self._max_bytes = settings.max_request_bytes
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # a client that left before the answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._max_bytes)
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, body.receive, send)
            return
        if not any(name == b"expect" for name, _ in scope["headers"]):  # else it waits for our word
            with suppress(HTTPException):
                await body.drain()
        if not body.complete:
            refusal.headers["Connection"] = "close"
        await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainJson | None:
        """The answer to a request that no route is to see; None lets it pass."""
        headers: dict[bytes, list[str]] = defaultdict(list)
        for name, value in scope["headers"]:
            headers[name].append(value.decode("latin-1"))
        server = scope.get("server")
        local = server[0] if server and server[1] is not None else None  # a Unix socket has no port
        foreign = self._hosts.refusal(headers[b"host"], headers[b"origin"], local)
        if foreign is not None:
            return error_response(*foreign)
        if scope["path"].startswith("/v1") and self._key is not None:
            given = (headers[b"authorization"] or [""])[-1].encode("latin-1")
            scheme, _, key = given.partition(b" ")  # RFC 9110, 11.4: "bearer" is the same scheme
            right = hmac.compare_digest(key.strip(), self._key)
            if not (right and scheme.lower() == b"bearer"):
                return error_response(
                    401,
                    "a valid API key is needed: Authorization: Bearer <key>",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._closing.is_set():
            return ending()
        length = (headers[b"content-length"] or ["0"])[-1]
        if length.isascii() and length.isdigit() and float(length) > self._max_bytes:
            error = _too_large(self._max_bytes)
            return error_response(error.status_code, error.detail)
        return None


def _too_large(max_bytes: int) -> HTTPException:
    """The refusal of a body over the limit."""
    return HTTPException(
        413, f"the body is larger than {max_bytes} bytes", headers={"Connection": "close"}
    )


class _Body:
    """A request's body on its way in, limited in size and in time."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._size = 0
        self.complete = False
        self._end = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        """The next part of the body; after the last one, the message that the client has left.

        Raises:
            HTTPException: 413, the body is too large; 408, it takes too long.
        """
        if self.complete:
            return await self._receive()
        message = await self._next()
        if self._size > self._max_bytes:
            await self.drain()
            raise _too_large(self._max_bytes)
        return message

    async def drain(self) -> None:
        """Reads on, up to a limit: a client that still writes would not see the answer."""
        while not self.complete and self._size < DRAINED * self._max_bytes:
            await self._next()

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            said = f"no whole body within {BODY_SECONDS} seconds"
            raise HTTPException(408, said, headers={"Connection": "close"}) from None
        self._size += len(message.get("body", b""))
        self.complete = not message.get("more_body")
        return message
