"""The JSON of requests and answers: OpenAI's fields, vLLM's extensions, and our `alpha`.

Types are strict and unknown fields are refused: to ignore a misspelt setting would be to answer
another question. The docstrings and descriptions are in the OpenAPI document.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=10_000_000)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
# OpenAI's penalties are not supported, but many clients send the default, 0.
Penalty = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    """What a stream brings besides text."""

    include_usage: bool | None = None


class _Sampling(_Strict):
    """The fields that completions and chat completions have in common."""

    model: str | None = Field(None, description="as in /v1/models; may be left out")
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="0 is greedy; 1 by default, as at OpenAI"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="0 or -1 keeps the whole vocabulary"
    )
    n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="with it, the same request has the same answer"
    )
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = (
        None
    )
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None = Field(
        None, description="token id -> what is added to its logit"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='log-probabilities name tokens as "token_id:<int>"'
    )
    alpha: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = Field(
        None, description="scale on (expert - antiexpert), of this request alone"
    )
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    user: str | None = Field(None, description="not looked at")


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    max_tokens: Count | None = Field(None, description="16 by default, as at OpenAI")
    logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="list the k likeliest tokens at each position; -1 is the vocabulary"
    )
    prompt_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="the same for every token of the prompt"
    )
    echo: bool | None = Field(None, description="the prompt comes back before the completion")
    add_special_tokens: bool | None = Field(
        None, description="whether the tokenizer may put its BOS before a text; true by default"
    )
    best_of: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="must equal n"
    )


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, description="not looked at")


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="OpenAI's newer name of max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="needs logprobs=true"
    )


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


class CompletionChoice(BaseModel):
    """One sample of one prompt; its index is prompt * n + sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


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


class ChatResponse(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
