"""Which names a server answers to, so that a web page cannot use it by a visitor's browser.

A page's own name can be made to point at the visitor's machine (DNS rebinding). Its requests then
bear the page's name as `Host`, and to the browser they are the page's own.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from proxytune.errors import UserError
from proxytune.loopback import is_loopback

_NAME = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+"
_AUTHORITY = re.compile(rf"(?P<host>{_NAME})(?::(?P<port>\d{{1,5}}))?")
_PORTS = {"http": "80", "https": "443"}


class Hosts:
    """The names by which a server may be asked.

    Args:
        allowed: names that are accepted whatever they point at; "*" is every name.

    Raises:
        UserError: one of them is not a name.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = {_plain(each) for each in allowed}
        odd = [each for each in self._allowed if each != "*" and not re.fullmatch(_NAME, each)]
        if odd:
            raise UserError(
                f"allowed_hosts={odd}: give names or addresses without scheme and port, such as "
                "allowed_hosts=[gpu1.example.org]; '*' allows every name"
            )
        self._own = _plain(socket.gethostname())

    def refusal(
        self, hosts: list[str], origins: list[str], local: str | None
    ) -> tuple[int, str] | None:
        """The status and the message for a request that a foreign page may have sent.

        Args:
            hosts: the request's Host headers; none in a request of HTTP/1.0.
            origins: its Origin headers; only browsers send one.
            local: the address of this machine that the client is connected to; None for a socket
                without one, which no browser reaches.

        Returns:
            None if the request may pass.
        """
        if local is None:
            return None
        for host in hosts:
            if not self._serves(host, local):
                way_out = f"; allowed_hosts=[{_name(host)}] lets it in" if _name(host) else ""
                return 421, f"this server is not asked by the name {_short(host)}{way_out}"
        for origin in origins:
            if not self._same(origin, hosts):
                return 403, f"requests from pages of {_short(origin)} are refused"
        return None

    def _serves(self, host: str, local: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        if name in self._allowed or "*" in self._allowed or is_loopback(f"http://{name}"):
            return True
        # An address in Host is where the client connected to; only a name can be rebound.
        return not _is_loopback_address(local) and (name == self._own or _is_address(name))

    def _same(self, origin: str, hosts: list[str]) -> bool:
        """Whether an origin is this server itself, or a name that the settings allow."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        name = _name(parts.netloc)
        if name is None or parts.scheme not in _PORTS or parts.path or parts.query:
            return False
        if name in self._allowed:
            return True
        default = _PORTS[parts.scheme]
        return _with_port(parts.netloc, default) in [_with_port(each, default) for each in hosts]


def _plain(name: str) -> str:
    return str(name).strip().lower().rstrip(".")


def _name(host: str) -> str | None:
    """The name of "name:port"; None for what is no such thing."""
    match = _AUTHORITY.fullmatch(host)
    return _plain(match["host"]) if match else None


def _with_port(host: str, default: str) -> tuple[str | None, str]:
    match = _AUTHORITY.fullmatch(host)
    return _name(host), (match and match["port"]) or default


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _is_loopback_address(local: str) -> bool:
    return is_loopback(f"http://[{local}]" if ":" in local else f"http://{local}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
