"""Every answer other than 200, in the shape that OpenAI's clients expect."""

import difflib
import json
import reprlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from proxytune.errors import Unanswered, UpstreamError
from proxytune.server.limits import MOST_STOPS, STOP_LENGTH
from proxytune.server.neutral import Strict, way_out
from proxytune.server.protocol import ChatRequest, CompletionRequest, ResponsesRequest
from proxytune.server.worker import BusyError, EndingError, WorkerError

ENDING = "the server is shutting down; ask again when it is back"

# Our own explanations for fields whose errors pydantic explains at great length.
_NESTED = ("formula", "stream_options")  # objects with fields of their own
_WANTED = {
    "formula": 'must be an object with the formula\'s name: {"name": "gated", "threshold": 0.5}',
    "prompt": "must be a string, a list of strings, of token ids, or of lists of token ids",
    "stop": f"must be a string of at most {STOP_LENGTH} characters, or a list of at most "
    f"{MOST_STOPS} of them, and none may be empty",
    "logit_bias": "must map token ids, as strings, to numbers from -100 to 100",
    "alpha": "must be a number from -100 to 100, or map names of pairs to such numbers",
    "input": "must be a string, or a list of messages (of system, developer, user or assistant) "
    "whose content is a string or a list of text parts",
}
_BODIES: dict[str, type[Strict]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's terms.

    Args:
        message: the mistake, and the way out.
        status: HTTP's number.
        param: the request's field at fault.
        code: the mistake's name, for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class PlainJson(JSONResponse):
    """JSON in ASCII: it can repeat any text of a client, lone surrogates too."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def short(text: object) -> str:
    """A client's word as it is repeated to the client; a long one is cut."""
    return reprlib.repr(text)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> PlainJson:
    """An error as OpenAI's clients expect it."""
    return PlainJson(error_body(status, message, param, code), status, headers)


def ending() -> PlainJson:
    """The answer to a request that came, or still ran, while the server ends."""
    return error_response(
        503, ENDING, code="shutting_down", headers={"Retry-After": "5", "Connection": "close"}
    )


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's JSON of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(error: Exception) -> tuple[int, str]:
    """HTTP's status and the message for an error that ends a running job."""
    if isinstance(error, TimeoutError):
        return 504, "this took longer than the server allows; ask for fewer tokens"
    if isinstance(error, EndingError):
        return 503, ENDING
    cause = error.__cause__
    if isinstance(cause, UpstreamError):
        return (503 if isinstance(cause, Unanswered) else 502), f"the API of the base: {cause}"
    return 500, "the server failed; its log says why"


def handle_errors(app: FastAPI) -> None:
    """Makes an app answer every error with OpenAI's JSON."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(
            error.status, error.message, param=error.param, code=error.code, headers=error.headers
        )

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        message = f"{error}; try again in a moment"
        return error_response(429, message, code="busy", headers={"Retry-After": "1"})

    @app.exception_handler(EndingError)
    async def closing(_: Request, error: EndingError) -> Response:
        return ending()

    @app.exception_handler(TimeoutError)
    @app.exception_handler(WorkerError)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_response(*explain(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        said = str(error.detail)
        if error.status_code in (404, 405):
            asked = short(f"{request.method} {request.url.path}")
            said = f"there is no {asked} here; GET /openapi.json lists what there is"
        elif isinstance(error.__cause__, RecursionError | ValueError):  # FastAPI's, of a body
            said = "the body is not JSON: nested too deeply, no UTF-8, or a number without end"
        return error_response(error.status_code, said, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _first_mistake(request, error)
        return error_response(400, message, param=param)


def _first_mistake(request: Request, error: RequestValidationError) -> tuple[str, str | None]:
    """A message about the first mistake in a body, and the field at fault."""
    errors = error.errors()
    # cut: a client may have sent megabytes as a name, and difflib takes seconds for them
    place = [str(part)[:80] for part in errors[0]["loc"][1:]]
    kind = errors[0]["type"]
    if kind == "json_invalid":
        return f"the body is not JSON: {errors[0]['ctx']['error']}", None
    if kind == "too_many":
        return f"{'.'.join(place) or 'the body'}: {errors[0]['msg']}", place[0] if place else None
    if not place:
        return "the body must be a JSON object, sent as Content-Type: application/json", None
    param = place[0]
    if kind == "extra_forbidden":
        name = ".".join(place)
        neutral = way_out(place[-1])
        if neutral is not None:
            return f"{name} is not supported; leave it out or send {neutral}", param
        body = next(body for path, body in _BODIES.items() if request.url.path.endswith(path))
        known = list(body.model_fields)
        close = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"; did you mean {close[0]}?" if close and len(place) == 1 else ""
        return f"unknown field {name!r}{hint}", param
    if kind == "missing":
        return f"{'.'.join(place)} is missing", param
    if param in _NESTED and len(place) > 1:
        return f"{'.'.join(place)}: {errors[0]['msg']}", param
    if param in _WANTED:
        return f"{param} {_WANTED[param]}", param
    # a field that takes several types has one error for each
    reasons = [each["msg"] for each in errors if str(each["loc"][1])[:80] == param]
    return f"{param}: {'; or '.join(dict.fromkeys(reasons))}", param
