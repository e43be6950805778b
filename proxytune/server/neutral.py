"""Fields of requests that change nothing here: accepted with these values, refused with others.

Clients send many fields with the value that stands for "not used", and fields for bookkeeping at
OpenAI. Both leave the answer as it is. Every other unknown field is refused by name: to ignore a
setting would be to answer another question. Null, an empty list and an empty text ask for nothing,
whatever the field; an empty object may (`web_search_options: {}` searches the web).
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MOST_FIELDS = 256  # of one object; none here has a quarter of them
Neutral = Mapping[str, tuple[Any, ...]]  # field -> its values that change nothing

# Taken and not looked at, whatever their value: they are about accounts, caches and records, about
# reasoning and tools, which no model has here, or shape a sampler that is refused (mirostat_tau).
BOOKKEEPING = frozenset(
    {
        "cache_prompt",
        "cache_salt",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "id_slot",
        "include_reasoning",
        "keep_alive",
        "max_tool_calls",
        "metadata",
        "mirostat_eta",
        "mirostat_tau",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "reasoning_format",
        "request_id",
        "return_progress",
        "rid",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "store",
        "stream_reasoning",
        "timings_per_token",
        "ttl",
        "user",
        "verbosity",
        "xtc_threshold",
    }
)
_DECODING: Neutral = {
    "bad_words": ([],),
    "detokenize": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "extra_body": ({},),
    "guidance_scale": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "nvext": ({},),
    "options": ({},),
    "penalty_alpha": (0,),
    "provider": ({},),
    "repeat_last_n": (-1,),
    "repeat_penalty": (1,),  # llama.cpp's name of repetition_penalty
    "response_format": ({"type": "text"},),
    "return_hidden_states": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # about tokens that are skipped
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "usage": ({"include": True}, {"include": False}),  # OpenRouter's; usage is always told
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "xtc_probability": (0,),
}
_TOOLS: Neutral = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # "auto" is the default, and there are no tools to choose
}
COMPLETION: Neutral = {**_DECODING, "suffix": ("",)}
CHAT: Neutral = {
    **_DECODING,
    **_TOOLS,
    "add_special_tokens": (False,),  # the template writes them
    "best_of": (1,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
}
MESSAGE: Neutral = {
    "annotations": ([],),
    "prefix": (True, False),  # the last turn decides what is continued
    "tool_calls": ([],),
    "type": ("message", "text"),  # "text" is lm-eval's local-chat-completions
}
RESPONSES: Neutral = {
    **_DECODING,
    **_TOOLS,
    "context_management": ([],),
    "truncation": ("disabled", "auto"),  # a prompt that is too long is refused anyway
}
RESPONSE_TEXT: Neutral = {"format": ({"type": "text"},)}
_TABLES = (COMPLETION, CHAT, RESPONSES, MESSAGE, RESPONSE_TEXT)


class Strict(BaseModel):
    """A JSON object of strict types, in which unknown fields are refused unless they do nothing.

    Attributes:
        ignored: unknown fields that may have any value.
        neutral: unknown fields that may have one of these values. Null, [] and "" are neutral
            everywhere.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_does_nothing(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        if len(body) > MOST_FIELDS:  # pydantic would name each that is unknown
            raise too_many(len(body), "fields", MOST_FIELDS)
        return {
            name: _as_json(value)
            for name, value in body.items()
            if name in cls.model_fields or not cls._does_nothing(name, value, body)
        }

    @classmethod
    def _does_nothing(cls, name: str, value: Any, body: Mapping[str, Any]) -> bool:
        """Whether an unknown field leaves the answer to the rest of the body as it is."""
        if value is None or value in ([], "") or name in cls.ignored:
            return True
        return any(_same(value, each) for each in cls.neutral.get(name, ()))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The OpenAPI document lists these fields, too."""
        schema = handler(core_schema)
        target = handler.resolve_ref_schema(schema)
        properties = target.setdefault("properties", {})
        for name in sorted(cls.ignored):
            properties.setdefault(name, {"description": "not looked at"})
        for name, values in cls.neutral.items():
            properties.setdefault(name, {"enum": [*values, None], "description": "changes nothing"})
        target["additionalProperties"] = {"enum": [None, [], ""]}
        return schema


def _as_json(value: Any) -> Any:
    """JSON has one kind of number: 4.0 is the integer 4, as some languages write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON is: 1 and 1.0 are one number, and no number is a truth value."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def too_many(count: int, things: str, most: int) -> PydanticCustomError:
    """The error for a list or an object that is too long to be looked at."""
    return PydanticCustomError(
        "too_many",
        "{count} {things} are more than the {most} that a request may have",
        {"count": count, "things": things, "most": most},
    )


def way_out(name: str) -> str | None:
    """What to send for a field that is accepted with its neutral value alone, as JSON."""
    values = next((table[name] for table in _TABLES if name in table), None)
    return None if values is None else json.dumps(values[0])
