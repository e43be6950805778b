"""Serves a base from this process, so that a base behind an API can be tried without an API."""

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from proxytune.api import load
from proxytune.loading.spec import ModelSpec
from proxytune.members.api.settings import LOCAL
from proxytune.server.app import create_app
from proxytune.server.connections import Server
from proxytune.server.settings import ServerSettings

_START_SECONDS = 60.0

_urls: dict[tuple[str, str], str] = {}


def with_local_bases(specs: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """The same models, with a server of this process wherever one says base_url: local."""
    found = dict(specs)
    for role, spec in specs.items():
        if spec.api is not None and spec.api.base_url == LOCAL:
            url = serve_locally(spec.id, spec.api.model)
            found[role] = replace(spec, api=replace(spec.api, base_url=url))
    return found


def serve_locally(model_id: str, name: str) -> str:
    """Serves a model of this machine from a thread of this process, on a free local port.

    It shows every log-probability and rates prompts. To try a weaker server, restrict the client
    by `top_logprobs`, `blocks` and `endpoint`. The server ends with the process.

    Args:
        model_id: a hub id or a local folder.
        name: the model's name for clients.

    Returns:
        The base URL.
    """
    if (model_id, name) in _urls:
        return _urls[model_id, name]
    app = create_app({name: load(model_id)}, ServerSettings(max_logprobs=-1))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Server(app, listener)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise OSError(f"the local server of {model_id} did not start")
        time.sleep(0.01)
    _urls[model_id, name] = f"http://127.0.0.1:{port}/v1"
    return _urls[model_id, name]
