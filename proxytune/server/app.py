"""The routes: OpenAI's completions and chat completions, models, health and metrics."""

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from proxytune.engine.sampling import NOTHING
from proxytune.engine.text import TokenTexts
from proxytune.generator import Generator
from proxytune.server import schemas
from proxytune.server.answers import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    Sample,
    generated_tokens,
    usage,
)
from proxytune.server.errors import ApiError, PlainJson, explain, handle_errors, short
from proxytune.server.gate import Gate, Metrics
from proxytune.server.playground import Playground, page
from proxytune.server.prepare import (
    Prepared,
    prepare_chat,
    prepare_completion,
    prepare_response,
)
from proxytune.server.protocol import ChatRequest, CompletionRequest, ResponsesRequest
from proxytune.server.responses import ResponsesAnswer
from proxytune.server.settings import ServerSettings
from proxytune.server.turns import Turns, share_models
from proxytune.server.worker import Ended, Piece, Rated, Worker, WorkerError

_GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
LONG_BYTES = 64 * 2**10  # bodies above it are encoded by a thread of their own
PATHS = frozenset(["/v1/models", *_GENERATING, "/health", "/metrics", "/", "/v1/playground"])
Body = TypeVar("Body", CompletionRequest, ChatRequest, ResponsesRequest)
_ERRORS = {
    400: "The request cannot be served as it is",
    401: "No valid API key",
    403: "The request comes from a foreign web page",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    421: "The server is not asked by this name (Host)",
    429: "Too much is waiting; see Retry-After",
    500: "The server failed",
    502: "The API of the base refused",
    503: "The server ends, or the API of the base did not answer",
    504: "It took longer than the server allows",
}
_ALWAYS = (403, 421, 503)  # what the gate may say on every path


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI document's entries for errors, by status."""
    return {
        status: {"model": schemas.ErrorResponse, "description": _ERRORS[status]}
        for status in statuses
    }


def _answers(response: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI document's entries for the answers of a route that generates."""
    # The stream has no schema: OpenAPI 3.1 has none for events, and readers would disagree on it.
    stream: dict[str, Any] = {"text/event-stream": {}}
    return {200: {"model": response, "content": stream}, **_errors(*_ERRORS)}


class Served:
    """One model that clients can name, and the worker that runs its jobs."""

    def __init__(self, name: str, generator: Generator, **worker: Any) -> None:
        self.name = name
        self.generator = generator
        self.texts = TokenTexts(generator.members["base"].need_tokenizer())
        self.worker = Worker(generator, **worker)
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
    playground: Playground | None = None,
) -> FastAPI:
    """The server as an ASGI app; its workers run from now on.

    Args:
        generators: one system, or name -> system; they may share models. Nobody else may decode
            with them meanwhile.
        settings: limits on requests.
        batch_size: rows decoded at once, per system; "auto" goes by the free memory.
        speculative: as for `Generator.generate`.
        playground: the page at /; None for none.

    Raises:
        UserError: a system has no tokenizer.
    """
    settings = settings or ServerSettings()
    if isinstance(generators, Generator):
        generators = {"proxytune": generators}
    turns = Turns() if share_models(generators.values()) else None
    models = {
        name: Served(
            name,
            generator,
            max_waiting=settings.max_waiting,
            batch_size=batch_size,
            speculative=speculative,
            rate=settings.prompt_logprobs and not settings.chat_only,
            turns=turns,
        )
        for name, generator in generators.items()
    }
    metrics = Metrics()
    for name, served in models.items():
        metrics.watch(name, served.worker)
    closing = threading.Event()
    routes = _Routes(models, settings, metrics, playground)
    app = _App(title="proxytune", lifespan=routes.lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes.router())
    app.add_middleware(
        Gate,
        paths=PATHS,
        metrics=metrics,
        settings=settings,
        closing=closing,
    )
    app.state.models = models
    app.state.settings = settings
    app.state.closing = closing
    handle_errors(app)
    return app


class _App(FastAPI):
    """A FastAPI whose OpenAPI document lists the errors that this server gives, and no others."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, without FastAPI's 422: a malformed body is answered by 400."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document


class _Routes:
    """The routes as methods; their docstrings are in the OpenAPI document.

    Args:
        models: by the names that clients use; the first one answers requests without a name.
        settings: limits on requests.
        metrics: counts tokens.
        playground: what the page at / is told.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        settings: ServerSettings,
        metrics: Metrics,
        playground: Playground | None,
    ) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._playground = playground
        # Prompts are encoded outside of the event loop, and long ones must not keep short ones
        # waiting: each kind has a thread.
        self._short = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="encode-long")

    def router(self) -> APIRouter:
        """All routes; without /v1/completions if the settings leave it out."""
        router = APIRouter()
        if not self._settings.chat_only:
            router.post("/v1/completions", responses=_answers(schemas.CompletionResponse))(
                self.completions
            )
        router.post("/v1/chat/completions", responses=_answers(schemas.ChatResponse))(
            self.chat_completions
        )
        router.post("/v1/responses", responses=_answers(schemas.ResponsesResponse))(self.responses)
        router.get("/v1/models", responses=_errors(401, *_ALWAYS))(self.list_models)
        router.get("/v1/models/{name:path}", responses=_errors(401, 404, *_ALWAYS))(self.one_model)
        unhealthy = {503: {"description": "An engine has ended, or the server ends"}}
        router.get("/health", responses=_errors(403, 421) | unhealthy)(self.health)
        router.head("/health", include_in_schema=False)(self.health)  # `wget --spider`
        router.get("/metrics", response_class=PlainTextResponse, responses=_errors(*_ALWAYS))(
            self.prometheus
        )
        if self._playground is not None:
            # not for programs: the OpenAPI document leaves them out
            router.get("/", include_in_schema=False)(self.page)
            router.get("/v1/playground", include_in_schema=False)(self.about)
        return router

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Ends the workers with the app."""
        yield
        for encoder in (self._short, self._long):
            encoder.shutdown(wait=False, cancel_futures=True)
        for served in self._models.values():
            served.worker.close()

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await self._answer(request, body, prepare_completion, CompletionAnswer)

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answers the last turn of a conversation."""
        return await self._answer(request, body, prepare_chat, ChatAnswer)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        """Answers the last turn of a conversation, in the form of OpenAI's newer endpoint."""
        return await self._answer(request, body, prepare_response, ResponsesAnswer)

    async def list_models(self) -> Response:
        """What clients may name as `model`."""
        return PlainJson({"object": "list", "data": [each.card for each in self._models.values()]})

    async def one_model(self, name: str) -> Response:
        """One of them."""
        return PlainJson(self._find(name).card)

    async def health(self) -> Response:
        """Whether the engines run."""
        alive = all(served.worker.alive for served in self._models.values())
        return PlainJson({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def prometheus(self) -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """The playground."""
        return page()

    async def about(self) -> Response:
        """What the playground's page shows besides answers."""
        assert self._playground is not None  # else there is no such route
        proxy = self._models[self._playground.systems["proxy"]].generator
        return PlainJson(self._playground.to_dict(proxy))

    async def _answer(
        self,
        request: Request,
        body: Body,
        prepare: Callable[[Body, Generator, ServerSettings], Prepared],
        make: Callable[[Body, Prepared, TokenTexts, str], Answer],
    ) -> Response:
        """Runs a request, and answers it whole or as a stream.

        Args:
            request: HTTP's; tells when the client leaves.
            body: its body.
            prepare: makes the job.
            make: makes the form of the answer.

        Raises:
            ApiError, BusyError, WorkerError, TimeoutError: see `errors.handle_errors`.
        """
        served = self._find(body.model)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(
            self._long if await _is_long(request) else self._short,
            prepare,
            body,
            served.generator,
            self._settings,
        )
        form = make(body, prepared, served.texts, served.name)
        served.worker.submit(prepared.job)
        exchange = _Exchange(served, prepared, form, self._metrics, self._settings.timeout)
        if body.stream:
            return _EventStream(exchange, exchange.stream())
        return await exchange.whole(request)

    def _find(self, name: str | None) -> Served:
        """The model of this name; the first one for a request that names none."""
        found = next(iter(self._models.values())) if name is None else self._models.get(name)
        if found is None:
            raise ApiError(
                f"no model {short(name)} here; there is {', '.join(self._models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found


class _Exchange:
    """One request from its job's start to its answer.

    Args:
        served: the model.
        prepared: the job, which its worker already has.
        form: writes the answer's JSON.
        metrics: counts tokens.
        seconds: the time that the job may take.
    """

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
        self._streamed = defaultdict[tuple[int, int], int](int)  # tokens of unfinished samples
        metrics.prompt_tokens.labels(served.name).inc(self._prompt_tokens)

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._generated)

    def _count(self, event: Ended) -> None:
        tokens = generated_tokens(event.finished)
        self._generated += tokens
        self._metrics.generated_tokens.labels(self.served.name).inc(tokens)

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; if the client leaves before it, the job ends unanswered."""
        work = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=499)
        finally:
            self.served.worker.cancel(self.job)
            work.cancel()
            gone.cancel()

    async def _collect(self) -> Response:
        samples: dict[tuple[int, int], Sample] = defaultdict(Sample)
        rated: dict[int, Any] = {}
        async for event in self.served.worker.events(self.job, self._seconds):
            if isinstance(event, Rated):
                rated[event.prompt] = event.tokens
            elif isinstance(event, Ended):
                samples[event.prompt, event.finished.sample].finished = event.finished
                self._count(event)
            else:
                samples[event.prompt, event.sample].add(event)

        def write() -> Response:
            return PlainJson(self._form.whole(samples, rated, self._usage()))

        return await asyncio.to_thread(write)  # whole vocabularies take a while

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        form = self._form
        rated: dict[int, Any] = {}
        opened: set[tuple[int, int]] = set()
        try:
            for each in form.begin():
                yield _sse(each)
            async for event in self.served.worker.events(self.job, self._seconds):
                if isinstance(event, Rated):
                    rated[event.prompt] = event.tokens
                    continue
                ended = isinstance(event, Ended)
                sample = event.prompt, event.finished.sample if ended else event.sample
                if sample not in opened:
                    opened.add(sample)
                    for each in form.opening(*sample, rated, self._usage()):
                        yield _sse(each)
                for each in self._written(event):
                    yield _sse(each)
            if not self.job.requests:  # max_tokens=0: the answer is the prompts
                for sample in self._prepared.samples():
                    for each in form.opening(*sample, rated, self._usage()):
                        yield _sse(each)
            for each in form.end(self._usage()):
                yield _sse(each)
            yield form.last
        except (TimeoutError, WorkerError) as error:
            yield _sse(form.failed(*explain(error)))

    def _written(self, event: Piece | Ended) -> list[dict[str, Any]]:
        """Counts a piece's token, and gives what a stream says about the event."""
        if isinstance(event, Ended):
            self._generated -= self._streamed.pop((event.prompt, event.finished.sample), 0)
            self._count(event)
            return self._form.ended(event.prompt, event.finished, self._usage())
        if event.id != NOTHING:
            self._generated += 1
            self._streamed[event.prompt, event.sample] += 1
        return self._form.piece(event, self._usage())


class _EventStream(StreamingResponse):
    """Server-sent events; when they end, or the client leaves, the job ends too."""

    def __init__(self, exchange: _Exchange, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.served.worker.cancel(self._exchange.job)


def _sse(content: dict[str, Any]) -> bytes:
    """One event; the events of /v1/responses are named by their type."""
    name = f"event: {content['type']}\n".encode() if "type" in content else b""
    return name + b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _is_long(request: Request) -> bool:
    return len(await request.body()) > LONG_BYTES


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
