"""Clients of OpenAI-compatible servers; what runs on this machine is asked without a proxy.

`HTTP_PROXY`, `HTTPS_PROXY` and `ALL_PROXY` are for the way out. A proxy cannot reach 127.0.0.1 of
this machine, and the libraries go around it only for what `NO_PROXY` names.
"""

import ipaddress
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from proxytune.errors import UserError

if TYPE_CHECKING:
    import openai

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # and the same in lower case


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine: localhost, 127.0.0.0/8, ::1, or 0.0.0.0."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def openai_client(base_url: str | None, **settings: Any) -> "openai.OpenAI":
    """A client of an OpenAI-compatible server; it takes no proxy to this machine.

    Args:
        base_url: of the server; None is OpenAI's own, or OPENAI_BASE_URL.
        settings: of `openai.OpenAI`.

    Raises:
        UserError: the environment names a proxy that cannot be used.
    """
    import openai

    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if is_loopback(url):
        settings["http_client"] = openai.DefaultHttpxClient(trust_env=False)
    try:
        return openai.OpenAI(base_url=base_url, **settings)
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its package; no address
        names = [name for key in PROXIES for name in (key, key.lower()) if os.environ.get(name)]
        if not names:
            raise
        raise UserError(
            f"{url} cannot be reached through the proxy of {' and '.join(names)}: {error}"
        ) from error


def without_proxies() -> None:
    """Takes every proxy out of this process's environment, for tests that stay on this machine."""
    for key in PROXIES:
        os.environ.pop(key, None)
        os.environ.pop(key.lower(), None)
