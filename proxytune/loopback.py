"""Clients of OpenAI-compatible servers; what runs on this machine is asked without a proxy.

`HTTP_PROXY`, `HTTPS_PROXY` and `ALL_PROXY` are for the way out. A proxy cannot reach 127.0.0.1 of
this machine, and the libraries go around it only for what `NO_PROXY` names.
"""

import ipaddress
import os
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from proxytune.errors import UserError
from proxytune.secrets import redacted

if TYPE_CHECKING:
    import openai

# the names of loopback in /etc/hosts of Linux distributions
_NAMES = (
    *("localhost", "localhost.localdomain", "localhost4", "localhost6"),
    *("ip6-localhost", "ip6-loopback"),
)
_SHORT = re.compile(r"(0x)?[\da-f]+(\.(0x)?[\da-f]+){0,2}")  # 127.1 and 0
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # and the same in lower case


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine: localhost, 127.0.0.0/8, ::1, or 0.0.0.0."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    if host in _NAMES or host.endswith(".localhost"):
        return True
    try:
        if _SHORT.fullmatch(host):
            host = socket.inet_ntoa(socket.inet_aton(host))
        address = ipaddress.ip_address(host)
    except (OSError, ValueError):
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def openai_client(base_url: str | None, **settings: Any) -> "openai.OpenAI":
    """A client of an OpenAI-compatible server; it takes no proxy to this machine.

    Args:
        base_url: of the server; None is OpenAI's own, or OPENAI_BASE_URL.
        settings: of `openai.OpenAI`.

    Raises:
        UserError: the URL is none, or the environment names a proxy or certificates that cannot
            be used.
    """
    import openai

    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    _check_address(url, redacted(url))
    if is_loopback(url):
        settings["http_client"] = openai.DefaultHttpxClient(trust_env=False)
    else:
        for name in _proxies():
            _check_address(os.environ[name], f"the proxy of {name}")
    try:
        return openai.OpenAI(base_url=base_url, **settings)
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its package; no address
        if not (names := _proxies()):
            raise
        raise UserError(
            f"{url} cannot be reached through the proxy of {' and '.join(names)}: {error}"
        ) from error
    except FileNotFoundError as error:
        given = [f"{name}={os.environ[name]}" for name in _CERTIFICATES if os.environ.get(name)]
        if not given:
            raise
        raise UserError(f"{' and '.join(given)}: there are no certificates ({error})") from error


def _proxies() -> list[str]:
    """The environment's variables that name a proxy."""
    return [name for key in PROXIES for name in (key, key.lower()) if os.environ.get(name)]


def _check_address(url: str, shown: str) -> None:
    """Refuses a URL that cannot be parsed, in words of ours: `openai` raises its library's error.

    Raises:
        UserError: its port or its host is none.
    """
    try:
        # reading the port checks it
        if not url.isprintable() or urlsplit(url if "://" in url else f"http://{url}").port == 0:
            raise ValueError("it holds an unprintable character, or port 0")
    except ValueError as error:
        raise UserError(f"{shown} is no address: {error}") from error


def without_proxies() -> None:
    """Takes every proxy out of this process's environment, for tests that stay on this machine."""
    for key in PROXIES:
        os.environ.pop(key, None)
        os.environ.pop(key.lower(), None)
