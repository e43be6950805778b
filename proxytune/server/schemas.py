"""The JSON of answers, as the OpenAPI document shows it; docstrings and descriptions are in it."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorBody


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens, and with echo of the prompt's."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """One token at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


class ListedToken(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    token_id: int
    logprob: float


class MemberLogprob(BaseModel):
    """A token's log-probability under one member, and that member's likeliest tokens."""

    logprob: float
    rank: int
    top: list[ListedToken]


class MemberToken(BaseModel):
    """A generated token under every member; "system" is the whole system."""

    token: str
    token_id: int
    drafted: bool
    members: dict[str, MemberLogprob]


class CompletionChoice(BaseModel):
    """One sample of one prompt; its index is prompt * n + sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    token_ids: list[int] | None = None
    member_logprobs: list[MemberToken] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopLogprob):
    """A token of the answer, and those that were likelier or nearly so."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatToken]


class ChatMessage(BaseModel):
    """What was answered."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None
    member_logprobs: list[MemberToken] | None = None


class ChatResponse(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


class OutputMessage(BaseModel):
    """The assistant's turn."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """Nothing is cached between requests."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """No model reasons apart from its answer."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesResponse(BaseModel):
    """The answer of POST /v1/responses; its other fields are OpenAI's with constant values."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    usage: ResponsesUsage
