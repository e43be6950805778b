"""Connections: how many there may be, how long each may be idle, and how the server ends.

uvicorn limits the time between two requests alone: a client that sends half a header, or reads no
answer, keeps its connection for ever, and the limit on connections applies after a whole request.
"""

import asyncio
import errno
import http
import logging
import os
import resource
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from proxytune.server.gate import BODY_SECONDS
from proxytune.server.settings import ServerSettings

log = logging.getLogger(__name__)

HEADER_SECONDS = 5  # from a connection's begin, or a request's first byte, to the whole headers
IDLE_SECONDS = 15  # between two requests; clients drop idle connections after 5 by default (httpx)
WRITE_SECONDS = 30  # a client that reads nothing of its answer for so long is cut off
FLUSH_SECONDS = 2  # at the end of the server, to send what was said last
_GRACE = 5  # seconds after the gate's own answer to a slow body
_SPARE_FILES = 32  # descriptors that are left to everything but connections
_LOG_SECONDS = 60  # between two lines about refused connections
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener(socket.socket):
    """A bound socket that keeps the number of open connections within a limit.

    At the limit the connection that waits longest for a whole request is closed for a new one;
    if all of them await answers, the new one is refused.

    Args:
        bound: taken over; it must not be used any more.
    """

    def __init__(self, bound: socket.socket) -> None:
        super().__init__(fileno=bound.detach())
        self.most = 0  # connections; set by `Server`
        self.known: set[Any] = set()  # the `Connection`s of the server, set by `Server`
        self._open: list[socket.socket] = []
        self._reported = -float(_LOG_SECONDS)
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: there is none now; asyncio asks again when the socket is readable.
        """
        self._open = [each for each in self._open if each.fileno() >= 0]
        if len(self._open) >= self.most:
            # uvicorn has not yet taken over those that were accepted in this round
            if len(self._open) <= len(self.known) and not self._make_room():
                self._refuse(f"all {self.most} connections await answers")
            raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in _NO_FILES:
                raise
            # A connection that stays in the queue would wake the event loop without end.
            os.close(self._spare)
            self._refuse(os.strerror(error.errno or 0).lower())
            self._spare = os.open(os.devnull, os.O_RDONLY)
            raise BlockingIOError from error
        self._open.append(connection)
        return connection, address

    def close(self) -> None:
        """Closes the socket; connections stay open."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        super().close()

    def _make_room(self) -> bool:
        """Closes the connection that waits longest for a whole request, if there is one."""
        waiting = [each for each in self.known if each.awaits_request]
        oldest = min(waiting, key=lambda each: each.since, default=None)
        if oldest is not None:
            oldest.end()
        return oldest is not None

    def _refuse(self, reason: str) -> None:
        connection, _ = super().accept()
        with connection:
            connection.setblocking(False)
            with suppress(OSError):  # it may have left already
                connection.send(_short_answer(503, "Retry-After: 1\r\n"))
        if time.monotonic() - self._reported > _LOG_SECONDS:
            self._reported = time.monotonic()
            log.warning("connections are refused: %s", reason)


class Connection(H11Protocol):
    """One connection, with a limit on every kind of waiting.

    Attributes:
        since: when the present wait began: for the headers, for the body, or for the answer.
    """

    answer_seconds = float("inf")  # for one answer, with its way to the client; set by `Server`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client is there; it has to send a request."""
        self.since = self._moved = time.monotonic()
        self._unread = 0  # bytes of the answer that the client has not taken
        self._state: tuple[object, ...] = (h11.IDLE, None, False)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """An answer is written; the next request may come."""
        super().on_response_complete()
        self._note()

    def resume_writing(self) -> None:
        """The client has read."""
        self._moved = time.monotonic()
        super().resume_writing()

    @property
    def awaits_request(self) -> bool:
        """Whether the request that this connection is to bring is not whole yet."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def check(self, now: float) -> None:
        """Ends a connection that has waited too long; called once per second."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._moved = now
        self._unread = unread
        idle = self.cycle is not None and not self._half_sent
        limits = {
            h11.IDLE: IDLE_SECONDS if idle else HEADER_SECONDS,
            h11.SEND_BODY: BODY_SECONDS + _GRACE,
        }
        limit = limits.get(self.conn.their_state, self.answer_seconds)
        if now - self._moved > WRITE_SECONDS:
            self.transport.abort()
        elif now - self.since > limit:
            self.end()

    def end(self) -> None:
        """Ends the connection now, with a word to a client whose request is half sent."""
        if self.transport.get_write_buffer_size() or not self.awaits_request:
            self.transport.abort()
            return
        if self._half_sent and not self.transport.is_closing():
            self.transport.write(_short_answer(408))
        self.transport.close()

    @property
    def _half_sent(self) -> bool:
        """Whether a part of a request's headers is there, and not all of them."""
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _note(self) -> None:
        """Notes when the connection begins to wait for something else."""
        state = self.conn.their_state, self.cycle, self._half_sent
        if state != self._state:
            self._state, self.since = state, time.monotonic()


def _short_answer(status: int, more: str = "") -> bytes:
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
    return f"{line}{more}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()


class Server(uvicorn.Server):
    """Serves an app of `create_app`, with limits on connections and an orderly end.

    After a signal new requests get 503. What has not ended within the settings'
    `shutdown_timeout` ends with an error: a stream by its last event, any other request by 503.

    Args:
        app: the app; its settings hold the limits.
        listener: a bound socket, which is taken over.
        place: printed once the server can be reached.
    """

    def __init__(self, app: FastAPI, listener: socket.socket, place: str = "") -> None:
        settings: ServerSettings = app.state.settings
        own = type("Connection", (Connection,), {})
        own.answer_seconds = BODY_SECONDS + settings.timeout + WRITE_SECONDS
        config = uvicorn.Config(
            app,
            http=own,
            ws="none",
            loop="asyncio",  # uvloop does not ask `Listener`
            log_config=None,
            log_level="error",  # its warnings are one line per malformed request
            access_log=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self._app = app
        self._place = place
        self._seconds = settings.shutdown_timeout
        self._listener = Listener(listener)
        self._listener.most = _connections(settings.max_connections)
        self._listener.known = self.server_state.connections

    def serve_forever(self) -> None:
        """Serves until a signal, or until `should_exit` is set."""
        self.run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections."""
        await super().startup(sockets)
        if self._place:
            print(self._place, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second; True ends the server."""
        if counter % 10 == 0:
            now = time.monotonic()
            for each in list(self.server_state.connections):
                if isinstance(each, Connection):
                    each.check(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server in the order that the class describes."""
        models = self._app.state.models.values()
        self._app.state.closing.set()
        await self._until(lambda: not any(each.worker.jobs for each in models), self._seconds)
        for each in models:
            each.worker.stop()
        await self._until(lambda: not self._unfinished(), FLUSH_SECONDS)
        for connection in self._unfinished():
            connection.transport.abort()
        await super().shutdown(sockets)

    def _unfinished(self) -> list[Any]:
        """The connections whose answer is not with the client yet."""
        return [
            each
            for each in self.server_state.connections
            if isinstance(each, Connection)
            and (
                each.transport.get_write_buffer_size()
                or (each.cycle is not None and not each.cycle.response_complete)
            )
        ]

    async def _until(self, done: Any, seconds: float) -> None:
        """Waits until `done()`, at most `seconds`; a second Ctrl-C ends the wait."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)


def _connections(wanted: int) -> int:
    """How many connections may be open: as many as wanted, if the limit on open files allows it."""
    used = len(list(Path("/dev/fd").iterdir())) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < used + wanted:
        most = used + wanted if hard == resource.RLIM_INFINITY else min(hard, used + wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft < used + wanted:
        log.warning(
            "max_connections=%d: the limit on open files (ulimit -n) allows %d",
            wanted,
            max(1, soft - used),
        )
    return max(1, min(wanted, soft - used))
