"""An OpenAI-compatible HTTP server for any system: `proxytune serve`; docs/serving.md.

protocol.py  the JSON of requests, as pydantic models
schemas.py   the JSON of answers
limits.py    how much a request may have
neutral.py   fields of requests that change nothing
prepare.py   a client's request -> a job: prompts encoded, settings checked
worker.py    one thread per system that runs the jobs of all clients in one decode loop
turns.py     workers whose systems share models decode one at a time
answers.py   the worker's events -> OpenAI's JSON
logprobs.py  log-probabilities in it
responses.py the same for /v1/responses
app.py       the routes
playground.py  the page at /, which shows a triple's systems side by side
connections.py  the listening socket, limits on connections, and the server's end
gate.py      names, the API key, limits and counters, before a request is read
hosts.py     which names a server answers to
errors.py    every answer other than 200
local.py     serves a base from this process, to try a base behind an API
settings.py  limits on the requests that a server accepts
"""

from typing import TYPE_CHECKING, Any

from proxytune.errors import extra
from proxytune.server.settings import ServerSettings

if TYPE_CHECKING:
    from proxytune.server.app import create_app
    from proxytune.server.connections import Server

__all__ = ["Server", "ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    # Lazy: the command must find a taken port before the seconds that importing torch takes.
    if name not in ("Server", "create_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("serve", "a server"):
        from proxytune.server import app, connections

    return connections.Server if name == "Server" else app.create_app
