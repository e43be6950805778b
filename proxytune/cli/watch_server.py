"""Serves the page of `proxytune watch` to this machine's browser, and to nobody else's pages."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from proxytune.errors import UserError
from proxytune.experiment.watching import Watcher
from proxytune.results.report import page_of
from proxytune.results.templates import HEADERS, asset, render
from proxytune.server.hosts import Hosts

_FRESH_S = 1.0  # several pages share a look at the folder
_TIMEOUT_S = 10.0  # for a client that sends half a request, or reads no answer


class WatchServer(ThreadingHTTPServer):
    """The page at /, what it shows at /state, and the run's report at /report.

    Args:
        watcher: looks at the folder.
        port: on 127.0.0.1; 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, watcher: Watcher, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot listen on port {port} ({reason}); choose another with --port "
                "(0 takes a free one)"
            ) from error
        self.hosts = Hosts()
        self._watcher = watcher
        self._lock = threading.Lock()
        self._state: tuple[float, bytes] = (-_FRESH_S, b"")
        self._report: tuple[float, bytes] | None = None

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def state(self) -> bytes:
        """What the page shows, as JSON; where the folder cannot be read, why."""
        with self._lock:
            if time.monotonic() - self._state[0] >= _FRESH_S:
                try:
                    found = self._watcher.look().to_dict()
                except (UserError, OSError) as error:
                    found = {"error": str(error)}
                self._state = time.monotonic(), json.dumps(found).encode()
            return self._state[1]

    def report(self) -> bytes:
        """The report of what has been scored; made again when its table has changed.

        Raises:
            UserError: there is no table yet, or a damaged file.
        """
        with self._lock:
            path = self._watcher.folder / "table.csv"
            changed = path.stat().st_mtime if path.is_file() else 0.0
            if self._report is None or self._report[0] != changed:
                page = page_of(self._watcher.folder).encode(errors="replace")
                self._report = changed, page
            return self._report[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that has left."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Answers a browser."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        foreign = self.server.hosts.refusal(hosts, origins, "127.0.0.1")
        if foreign is not None:
            said = foreign[1].partition(";")[0]  # what allows a name is a setting of `serve`
            self._answer(foreign[0], "text/plain", said.encode(errors="replace"))
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(200, "text/html", _page().encode())
        elif path == "/state":
            self._answer(200, "application/json", self.server.state())
        elif path == "/report":
            try:
                self._answer(200, "text/html", self.server.report())
            except UserError as error:
                self._answer(404, "text/plain", str(error).encode(errors="replace"))
        else:
            self._answer(404, "text/plain", b"/, /state and /report are here")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each look would fill the terminal."""


def _page() -> str:
    """The page; it holds no text of the folder."""
    return render(
        "watch.html",
        title="proxytune watch",
        css=asset("page.css") + asset("watch.css"),
        js=asset("page.js") + asset("watch.js"),
    )
