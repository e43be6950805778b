"""HTTP by hand: what no client library would send to a server of these tests."""

import json
import re
import socket

BAN = {"2": -100}  # the end token: completions are as long as they may be


def connect(url: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 5)
    connection.settimeout(40)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def message(method: str, path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """A request as bytes; a header of value None is left out."""
    known: dict[str, str | None] = {"Host": "localhost", "Connection": "close"}
    if body:
        known |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in known.items() if value is not None]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1") + body


def ask(url: str, data: bytes) -> tuple[int, bytes]:
    """Sends bytes; the answer's status (0 without one) and body."""
    with connect(url) as connection:
        connection.sendall(data)
        answer = read_all(connection)
    status = re.match(rb"HTTP/1.1 (\d{3})", answer)
    return int(status[1]) if status else 0, answer.partition(b"\r\n\r\n")[2]


def completion(**more) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 2} | more).encode()
