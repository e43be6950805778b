"""The JSON of requests: OpenAI's fields, vLLM's extensions, and our `alpha` and `formula`.

Types are strict and unknown fields are refused, except where they change nothing (`neutral`). The
docstrings and descriptions are in the OpenAPI document.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from proxytune.server.limits import (
    MOST_BIASES,
    MOST_STOPS,
    MOST_TURNS,
    Alpha,
    BeginIds,
    Bias,
    Limit,
    Number,
    Penalty,
    Prompts,
    Stop,
    Text,
    at_most,
)
from proxytune.server.neutral import (
    BOOKKEEPING,
    CHAT,
    COMPLETION,
    MESSAGE,
    RESPONSE_TEXT,
    RESPONSES,
    Strict,
)


class StreamOptions(Strict):
    """What a stream brings besides text."""

    ignored = frozenset({"include_obfuscation"})

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage, every chunk has the usage so far"
    )


class FormulaChoice(Strict):
    """A formula of docs/formulas.md and its settings; those left out are as in conf/formula."""

    name: Annotated[str, Field(max_length=64)] = Field(
        description="proxy, dexperts, gated, contrastive or guidance"
    )
    top_k: Annotated[int, Field(le=2**31 - 1)] | None = Field(None, description="of dexperts")
    top_p: Number | None = Field(None, description="of dexperts")
    threshold: Number | None = Field(None, description="of gated")
    plausibility: Number | None = Field(None, description="of contrastive")


class _Choosing(Strict):
    """The fields that say how tokens are chosen; all three endpoints have them."""

    ignored = BOOKKEEPING

    model: str | None = Field(None, description="as in /v1/models; may be left out")
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="0 is greedy; 1 by default, as at OpenAI"
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="0 keeps the likeliest token alone"
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="0 or -1 keeps the whole vocabulary"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="drops tokens below this share of the likeliest one's probability"
    )
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        None, description="scales the logits of tokens in the prompt and the completion"
    )
    presence_penalty: Penalty | None = Field(
        None, description="subtracted from the logits of tokens in the completion"
    )
    frequency_penalty: Penalty | None = Field(
        None, description="the same, times how often the token stands there"
    )
    ignore_eos: bool | None = Field(None, description="goes on after an end token")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="with it, the same request has the same answer"
    )
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None,
        at_most(MOST_STOPS, "stop strings"),
    ] = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None,
        at_most(MOST_BIASES, "tokens"),
    ] = Field(None, description="token id -> what is added to its logit")
    stream: bool | None = None
    alpha: Annotated[
        Alpha | dict[Annotated[str, Field(max_length=64)], Alpha] | None, at_most(64, "pairs")
    ] = Field(
        None,
        description="scale on (expert - antiexpert), of this request alone; of a triple with "
        "several pairs also a mapping, pair -> its scale",
    )
    formula: FormulaChoice | None = Field(
        None, description="combines the members' logits, in place of the server's formula"
    )

    @classmethod
    def _does_nothing(cls, name: str, value: Any, body: Mapping[str, Any]) -> bool:
        # benchmarks ask for a fixed length by both fields; without an end there is no minimum
        if name == "min_tokens" and body.get("ignore_eos") is True and not body.get("stop"):
            return isinstance(value, int | float)
        return super()._does_nothing(name, value, body)


class _Sampling(_Choosing):
    """The fields that completions and chat completions have in common."""

    n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='log-probabilities name tokens as "token_id:<int>"'
    )
    return_token_ids: bool | None = Field(
        None, description="the answer brings token_ids and prompt_token_ids (of the base)"
    )
    member_logprobs: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="for each token, every member's log-probability and k likeliest tokens"
    )
    begin_token_ids: BeginIds | None = Field(
        None, description="tokens that begin every answer; the completion comes after them"
    )


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    neutral = COMPLETION

    prompt: Prompts
    max_tokens: Limit | None = Field(
        None, description="16 by default, as at OpenAI; -1 is the rest of the context"
    )
    max_completion_tokens: Limit | None = Field(None, description="another name of max_tokens")
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


class TextPart(Strict):
    """A part of a message's content."""

    ignored = frozenset({"cache_control", "prompt_cache_breakpoint"})

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    ignored = frozenset({"cache_control", "created_at", "id", "timestamp"})
    neutral = MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[TextPart], Field(min_length=1)],
        at_most(MOST_TURNS, "parts"),
    ]
    name: str | None = Field(None, description="not looked at")


TemplateVariables = Annotated[
    dict[Annotated[str, Field(max_length=64)], Any] | None, at_most(64, "variables")
]
TEMPLATE_VARIABLES: Any = Field(
    None, description="variables of the members' chat templates, name -> value"
)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    neutral = CHAT

    messages: Annotated[list[Message], Field(min_length=1), at_most(MOST_TURNS, "messages")]
    max_tokens: Limit | None = Field(None, description="null and -1: the rest of the context")
    max_completion_tokens: Limit | None = Field(
        None, description="OpenAI's newer name of max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="needs logprobs=true"
    )
    continue_final_message: bool | None = Field(
        None, description="must be true where the last turn is the assistant's, else false"
    )
    add_generation_prompt: bool | None = Field(None, description="must be the opposite")
    chat_template_kwargs: TemplateVariables = TEMPLATE_VARIABLES


class InputPart(Strict):
    """A part of the content of an input message."""

    ignored = frozenset({"cache_control", "logprobs", "prompt_cache_breakpoint"})
    neutral = MESSAGE

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(Strict):
    """One turn of the input, given by the client or answered before."""

    ignored = frozenset({"id", "phase", "status"})

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[InputPart], Field(min_length=1)],
        at_most(MOST_TURNS, "parts"),
    ]


class ResponseTextSettings(Strict):
    """The form of the answer: text alone."""

    ignored = frozenset({"verbosity"})
    neutral = RESPONSE_TEXT


OUTPUT_LOGPROBS = "message.output_text.logprobs"
# What an answer may bring besides its text. All but the log-probabilities belong to tools and to
# reasoning, which no answer has here.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(_Choosing):
    """POST /v1/responses: text in, text out; nothing is stored."""

    # `background` (inspect_ai sends true) lets a server answer later; this one answers at once.
    # `stream_options` holds include_obfuscation alone.
    ignored = BOOKKEEPING | {"background", "stream_options"}
    neutral = RESPONSES

    input: Annotated[
        Text | Annotated[list[InputMessage], Field(min_length=1)],
        at_most(MOST_TURNS, "messages"),
    ]
    instructions: Text | None = Field(None, description="a system turn before the input")
    max_output_tokens: Limit | None = None
    include: Annotated[list[Includable] | None, at_most(MOST_TURNS, "names")] = None
    top_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description=f"needs include={[OUTPUT_LOGPROBS]}"
    )
    text: ResponseTextSettings | None = None
    chat_template_kwargs: TemplateVariables = TEMPLATE_VARIABLES
