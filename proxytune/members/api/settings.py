"""The settings of an endpoint: where it is, how to ask it, and the budget."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from proxytune.errors import UserError

LOCAL = "local"
MISSING = "???"  # as OmegaConf writes it: Hydra builds its schema from `ApiSettings`


@dataclass(kw_only=True)
class ApiSettings:
    """An OpenAI-compatible endpoint that serves a base; docs/black_box.md.

    Attributes:
        base_url: "https://host/v1"; with "local", the commands serve the base's own folder from
            their process.
        model: the server's name for the model.
        api_key_env: the environment variable that holds the key; null sends none.
        top_logprobs: tokens listed at each position; -1 is the whole vocabulary, "auto" the most
            that the server grants, up to 100.
        endpoint: "auto", "completions" or "chat".
        blocks: whether one request may score several tokens, if the server gives the
            log-probabilities of a prompt's tokens.
        foreign_tokenizer: the server's tokenizer differs from the triple's: prompts are sent as
            text, and each listed word stands for the triple's token that writes it. For answers
            of a single token.
        max_concurrency: requests at once.
        timeout_s: seconds that one request may take.
        retry_for_s: seconds for which a failing request is tried again.
        prompt_price, completion_price: money per 1,000 tokens.
        max_requests, max_tokens, max_cost: the budget of a results folder, for all its runs
            together.
        cache: the file that keeps the answers; null is api.sqlite in the results folder.
    """

    base_url: str = MISSING
    model: str = MISSING
    api_key_env: str | None = None
    top_logprobs: Any = "auto"
    endpoint: str = "auto"
    blocks: bool = True
    foreign_tokenizer: bool = False
    max_concurrency: int = 8
    timeout_s: float = 120
    retry_for_s: float = 600
    prompt_price: float = 0
    completion_price: float = 0
    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    cache: str | None = None


def settings_of(api: Mapping[str, Any]) -> ApiSettings:
    """The checked settings of an endpoint.

    Raises:
        UserError: an unknown key, or an impossible value.
    """
    unknown = api.keys() - {each.name for each in fields(ApiSettings)}
    if unknown:
        raise UserError(f"unknown key {sorted(unknown)[0]!r} in the settings of an API")
    settings = ApiSettings(**api)
    for key in ("base_url", "model"):
        if not api.get(key) or api[key] == MISSING:
            raise UserError(f"the API of the base has no {key}; give triple.base.api.{key}=...")
    top = settings.top_logprobs
    if top != "auto" and (not isinstance(top, int) or top < -1 or top == 0):
        raise UserError(f"top_logprobs={top!r} is neither 'auto', -1 (all) nor at least 1")
    if settings.endpoint not in ("auto", "completions", "chat"):
        raise UserError(f"endpoint={settings.endpoint!r} is none of auto, completions, chat")
    if settings.max_concurrency < 1:
        raise UserError(f"max_concurrency={settings.max_concurrency} must be at least 1")
    return settings
