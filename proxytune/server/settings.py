"""What the person who serves a system may set."""

from dataclasses import dataclass


@dataclass
class ServerSettings:
    """What a server lets its clients do.

    Attributes:
        api_key: must come with every request as a bearer token; null lets everybody in.
        max_logprobs: log-probabilities per token that a client may ask for; -1 is the vocabulary.
        prompt_logprobs: whether prompts are rated (prompt_logprobs, echo with logprobs).
        chat_only: leaves /v1/completions out.
        max_request_bytes: of a request's body.
        max_tokens: of one completion; null is the models' context.
        max_completions: prompts times n of one request.
        max_waiting: completions that may wait for a row; then clients get 429.
        timeout: seconds that one request may take.
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

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ValueError("api_key is empty; give a secret, or null to let everybody in")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs}; -1 is the whole vocabulary")
        for name in (
            "max_request_bytes",
            "max_tokens",
            "max_completions",
            "max_waiting",
            "timeout",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
