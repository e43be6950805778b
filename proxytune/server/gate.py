"""Checks of every request before any route sees it (key, size, time), and the metrics."""

import asyncio
import hmac
import time
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.server.errors import error_response
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
        api_key: needed for paths under /v1; None lets everybody in.
        max_bytes: the limit on a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: frozenset[str],
        metrics: Metrics,
        api_key: str | None,
        max_bytes: int,
    ) -> None:
        self.app = app
        self._paths = paths
        self._metrics = metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_bytes = max_bytes

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
        headers = dict(scope["headers"])
        if scope["path"].startswith("/v1") and self._key is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                await error_response(
                    401,
                    "a valid API key is needed: Authorization: Bearer <key>",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )(scope, receive, send)
                return
        body = _Body(receive, self._max_bytes)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            with suppress(HTTPException):
                await body.drain()
            error = body.too_large()
            await error_response(error.status_code, error.detail)(scope, receive, send)
            return
        await self.app(scope, body.receive, send)


class _Body:
    """A request's body on its way in, limited in size and in time."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._size = 0
        self._complete = False
        self._end = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        """The next part of the body; after the last one, the message that the client has left.

        Raises:
            HTTPException: 413, the body is too large; 408, it takes too long.
        """
        if self._complete:
            return await self._receive()
        message = await self._next()
        if self._size > self._max_bytes:
            await self.drain()
            raise self.too_large()
        return message

    async def drain(self) -> None:
        """Reads on, up to a limit: a client that still writes would not see the answer."""
        while not self._complete and self._size < DRAINED * self._max_bytes:
            await self._next()

    def too_large(self) -> HTTPException:
        """The refusal of a body over the limit."""
        return HTTPException(413, f"the body is larger than {self._max_bytes} bytes")

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"no whole body within {BODY_SECONDS} seconds") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body")
        return message
