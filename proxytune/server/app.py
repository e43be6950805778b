"""The routes: OpenAI's completions and chat completions, models, health and metrics."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from proxytune.engine.text import TokenTexts
from proxytune.generator import Generator
from proxytune.server import protocol
from proxytune.server.answers import (
    ChatAnswer,
    CompletionAnswer,
    Sample,
    generated_tokens,
    usage,
)
from proxytune.server.errors import ApiError, PlainJson, error_body, explain, handle_errors
from proxytune.server.gate import Gate, Metrics
from proxytune.server.prepare import Prepared, prepare_chat, prepare_completion
from proxytune.server.protocol import ChatRequest, CompletionRequest
from proxytune.server.settings import ServerSettings
from proxytune.server.worker import Ended, Engine, EngineError, Rated

PATHS = frozenset(["/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"])
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse, "description": text}
    for status, text in {
        400: "The request cannot be served as it is",
        401: "No valid API key",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        429: "Too much is waiting; see Retry-After",
        500: "The server failed",
        502: "The API of the base refused",
        503: "The API of the base did not answer",
        504: "It took longer than the server allows",
    }.items()
}
# Without a schema: OpenAPI 3.1 has none for events, and readers disagree on what one would mean.
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
Answer = CompletionAnswer | ChatAnswer


class Served:
    """One model that clients can name."""

    def __init__(self, name: str, generator: Generator, **engine: Any) -> None:
        self.name = name
        self.generator = generator
        self.texts = TokenTexts(generator.members["base"].need_tokenizer())
        self.engine = Engine(generator, **engine)
        self.card = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "proxytune",
            "max_model_len": generator.max_positions,
        }


def create_app(
    generators: Generator | Mapping[str, Generator],
    settings: ServerSettings | None = None,
    *,
    batch_size: Any = "auto",
    speculative: Any = "auto",
) -> FastAPI:
    """The server as an ASGI app; its engines run from now on.

    Args:
        generators: one system, or name -> system. Nobody else may decode with them meanwhile.
        settings: what clients may do.
        batch_size: rows decoded at once, per system; "auto" goes by the free memory.
        speculative: as for `Generator.generate`.

    Raises:
        ValueError: a system without a tokenizer.
    """
    settings = settings or ServerSettings()
    if isinstance(generators, Generator):
        generators = {"proxytune": generators}
    metrics = Metrics()
    models: dict[str, Served] = {}
    for name, generator in generators.items():
        models[name] = Served(
            name,
            generator,
            max_waiting=settings.max_waiting,
            batch_size=batch_size,
            speculative=speculative,
            rate=settings.prompt_logprobs and not settings.chat_only,
        )
        metrics.watch(name, models[name].engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for served in models.values():
            served.engine.close()

    app = FastAPI(title="proxytune", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate,
        paths=PATHS,
        metrics=metrics,
        api_key=settings.api_key,
        max_bytes=settings.max_request_bytes,
    )
    app.state.models = models
    handle_errors(app)
    # One thread encodes prompts: a long one must not stop the others' streams.
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def find(name: str | None) -> Served:
        found = next(iter(models.values())) if name is None else models.get(name)
        if found is None:
            raise ApiError(
                f"no model {name!r} here; there is {', '.join(models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    async def answer(
        request: Request,
        body: Any,
        prepare: Callable[[Any, Generator, ServerSettings], Prepared],
        make: Callable[[Any, Prepared, TokenTexts, str], Answer],
    ) -> Response:
        served = find(body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError("stream_options needs stream=true", param="stream_options")
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(encoder, prepare, body, served.generator, settings)
        form = make(body, prepared, served.texts, served.name)
        served.engine.submit(prepared.job)
        exchange = _Exchange(served, prepared, form, metrics, settings.timeout)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return _EventStream(exchange, exchange.stream(with_usage))
        return await exchange.whole(request)

    if not settings.chat_only:

        @app.post(
            "/v1/completions",
            responses={200: {"model": protocol.CompletionResponse, **_STREAM}, **_ERRORS},
        )
        async def completions(body: CompletionRequest, request: Request) -> Response:
            """Continues prompts."""
            return await answer(request, body, prepare_completion, CompletionAnswer)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": protocol.ChatResponse, **_STREAM}, **_ERRORS},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers the last turn of a conversation."""
        return await answer(request, body, prepare_chat, ChatAnswer)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def list_models() -> Response:
        """What clients may name as `model`."""
        return PlainJson({"object": "list", "data": [each.card for each in models.values()]})

    @app.get("/v1/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def one_model(name: str) -> Response:
        """One of them."""
        return PlainJson(find(name).card)

    @app.get("/health", responses={503: {"description": "An engine has ended"}})
    async def health() -> Response:
        """Whether the engines run."""
        alive = all(served.engine.alive for served in models.values())
        return PlainJson({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # which is a 400 here
        return document

    app.openapi = openapi
    return app


class _Exchange:
    """One request on its way through the engine."""

    def __init__(
        self, served: Served, prepared: Prepared, form: Answer, metrics: Metrics, seconds: float
    ) -> None:
        self.served = served
        self.job = prepared.job
        self._prepared = prepared
        self._form = form
        self._metrics = metrics
        self._seconds = seconds
        self._prompt_tokens = sum(map(len, prepared.ids))
        self._generated = 0
        metrics.prompt_tokens.labels(served.name).inc(self._prompt_tokens)

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._generated)

    def _count(self, event: Ended) -> None:
        tokens = generated_tokens(event.finished)
        self._generated += tokens
        self._metrics.generated_tokens.labels(self.served.name).inc(tokens)

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; nobody's, once the client has left."""
        work = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=499)
        finally:
            self.served.engine.cancel(self.job)
            work.cancel()
            gone.cancel()

    async def _collect(self) -> Response:
        samples: dict[tuple[int, int], Sample] = defaultdict(Sample)
        rated: dict[int, Any] = {}
        async for event in self.served.engine.events(self.job, self._seconds):
            if isinstance(event, Rated):
                rated[event.prompt] = event.tokens
            elif isinstance(event, Ended):
                samples[event.prompt, event.finished.sample].finished = event.finished
                self._count(event)
            elif event.token is not None:
                samples[event.prompt, event.sample].tokens.append(event.token)

        def write() -> Response:
            return PlainJson(self._form.whole(samples, rated) | {"usage": self._usage()})

        return await asyncio.to_thread(write)  # whole vocabularies take a while

    async def stream(self, with_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        more = {"usage": None} if with_usage else {}
        rated: dict[int, Any] = {}
        opened: set[tuple[int, int]] = set()
        try:
            async for event in self.served.engine.events(self.job, self._seconds):
                if isinstance(event, Rated):
                    rated[event.prompt] = event.tokens
                    continue
                ended = isinstance(event, Ended)
                sample = event.prompt, event.finished.sample if ended else event.sample
                if sample not in opened:
                    opened.add(sample)
                    opening = self._form.opening(*sample, rated)
                    if opening is not None:
                        yield _sse(opening | more)
                if isinstance(event, Ended):
                    self._count(event)
                    reason = event.finished.finish_reason
                    yield _sse(self._form.chunk(*sample, "", None, reason) | more)
                elif event.text or event.token is not None:
                    yield _sse(self._form.chunk(*sample, event.text, event.token, None) | more)
            if not self.job.requests:  # max_tokens=0: the prompts alone
                for sample in self._prepared.samples():
                    opening = self._form.opening(*sample, rated)
                    yield _sse((opening or self._form.empty()) | more)
            if with_usage:
                yield _sse(self._form.empty() | {"usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except (TimeoutError, EngineError) as error:
            yield _sse(error_body(*explain(error)))


class _EventStream(StreamingResponse):
    """Server-sent events; the job ends with them, also when the client leaves."""

    def __init__(self, exchange: _Exchange, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.served.engine.cancel(self._exchange.job)


def _sse(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
