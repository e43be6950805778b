"""An OpenAI-compatible HTTP server for any system: `proxytune serve`; docs/serving.md.

protocol.py  what clients may send, as pydantic models
prepare.py   a client's request -> a job: prompts encoded, settings checked
worker.py    one thread per system that runs the jobs of all clients in one decode loop
answers.py   what the engine reports -> OpenAI's JSON
app.py       the routes
gate.py      the API key, limits and counters, before a request is read
errors.py    every answer other than 200
local.py     our own server for a base that has none
settings.py  what the person who serves may set
"""

from typing import TYPE_CHECKING, Any

from proxytune.errors import extra
from proxytune.server.settings import ServerSettings

if TYPE_CHECKING:
    from proxytune.server.app import create_app

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    # The command finds a taken port before it imports torch, which takes seconds.
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("serve", "a server"):
        from proxytune.server.app import create_app

    return create_app
