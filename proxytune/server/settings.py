"""The settings of a server."""

import math
import re
from dataclasses import dataclass, field

from proxytune.errors import UserError
from proxytune.server.hosts import Hosts


@dataclass
class ServerSettings:
    """Limits on the requests that a server accepts.

    Attributes:
        api_key: must come with every request as a bearer token; null lets everybody in.
        max_logprobs: log-probabilities per token that a client may ask for; -1 allows the whole
            vocabulary.
        prompt_logprobs: whether clients may ask for log-probabilities of prompts (by
            prompt_logprobs, or by echo with logprobs).
        chat_only: leaves /v1/completions out.
        max_request_bytes: the largest body of a request.
        max_tokens: the longest completion; null is the models' context.
        max_completions: the most completions (prompts times n) of one request.
        max_waiting: while as many completions wait for a row, new requests get 429.
        timeout: seconds that one request may take.
        max_connections: the most open connections; the limit on open files may lower it.
        shutdown_timeout: seconds that running requests have to end after the server was asked to.
        allowed_hosts: names by which clients may ask, besides those of this machine; see `Hosts`.
    """

    api_key: str | None = None
    max_logprobs: int = 20
    prompt_logprobs: bool = True
    chat_only: bool = False
    max_request_bytes: int = 4 * 2**20
    max_tokens: int | None = None
    max_completions: int = 512
    max_waiting: int = 512
    timeout: float = 600.0
    max_connections: int = 1024
    shutdown_timeout: float = 5.0
    allowed_hosts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise UserError("api_key is empty; give a secret, or null to let everybody in")
        if self.api_key is not None and not re.fullmatch(r"\S+", self.api_key):
            raise UserError("api_key has white space in it, which no request can send; remove it")
        if self.max_logprobs < -1:
            raise UserError(f"max_logprobs={self.max_logprobs}; -1 is the whole vocabulary")
        limits = {
            "max_request_bytes": self.max_request_bytes,
            "max_tokens": self.max_tokens,
            "max_completions": self.max_completions,
            "max_waiting": self.max_waiting,
            "timeout": self.timeout,
            "max_connections": self.max_connections,
        }
        for name, value in limits.items():
            # written so that NaN is refused, too
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be a number above 0")
        if not 0 <= self.shutdown_timeout < math.inf:
            raise UserError(f"shutdown_timeout={self.shutdown_timeout} must be at least 0")
        Hosts(self.allowed_hosts)
