"""Runs an app of `proxytune.server` on a free local port, in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from proxytune.server.connections import Server


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serves an app until the block ends; gives its base URL, "http://127.0.0.1:<port>/v1"."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app.state.settings.shutdown_timeout = 1
    server = Server(app, listener)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
