"""From a client's request to a job of the worker: settings checked, prompts encoded."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from proxytune.engine.combining import Combination
from proxytune.engine.penalties import NO_RAW_LOGITS
from proxytune.engine.rows import Request, longest
from proxytune.engine.sampling import Sampler
from proxytune.engine.score import same_tokens
from proxytune.errors import UserError
from proxytune.formula import shipped
from proxytune.generator import Generator
from proxytune.loading.prompting import begun_answer, prompt_ids
from proxytune.records import Decoding, make_decoding
from proxytune.server.errors import ApiError
from proxytune.server.protocol import (
    OUTPUT_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    InputMessage,
    Message,
    ResponsesRequest,
)
from proxytune.server.settings import ServerSettings
from proxytune.server.worker import Job, can_rate

DEFAULT_MAX_TOKENS = 16  # of a completion, as at OpenAI
GREEDY_BELOW = 1e-4  # a lower temperature differs from 0 by rounding alone
UNLIMITED_CONTEXT = 4096  # tokens of a chat answer if neither the model nor the settings limit it

_LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
# Fields of a request that are settings of `Decoding` by the same name.
_SAMPLING = CompletionRequest.model_fields.keys() & {each.name for each in fields(Decoding)}

AnyRequest = CompletionRequest | ChatRequest | ResponsesRequest
Prompt = str | list[int]  # a text, or token ids


@dataclass(frozen=True)
class Prepared:
    """A job, and the facts of the request that its answer needs besides.

    Attributes:
        job: for the worker.
        ids: the token ids of each prompt, as the base reads them.
        echo: the text of each prompt, which the answer repeats before the completion; None where
            the request does not ask for it.
        n: samples per prompt.
    """

    job: Job
    ids: list[list[int]]
    echo: list[str] | None
    n: int

    def samples(self) -> list[tuple[int, int]]:
        """Every (prompt, sample number), in the order of the answer."""
        return [(prompt, number) for prompt in range(len(self.ids)) for number in range(self.n)]


def prepare_completion(
    body: CompletionRequest, generator: Generator, settings: ServerSettings
) -> Prepared:
    """The job of POST /v1/completions.

    Raises:
        ApiError: the request cannot be served.
    """
    _check_stream(body)
    prompts = _prompts(body)
    default = min(DEFAULT_MAX_TOKENS, settings.max_tokens or DEFAULT_MAX_TOKENS)
    max_tokens = _max_tokens(body, generator, settings, default)
    n = _samples(body.n or 1, len(prompts), settings)
    _refuse_completion(body, max_tokens, n, generator, settings)
    tops = _prompt_tops(body)
    ids = [_encode(prompt, body.add_special_tokens is not False, generator) for prompt in prompts]
    ids = [_begun(each, body, generator) for each in ids]
    job = Job(
        top=body.logprobs,
        members_top=body.member_logprobs,
        rate_top=-1 if -1 in tops else max(tops, default=0),
        combination=_combination(body, generator),
        pieces=bool(body.stream or body.return_token_ids),
        streams=bool(body.stream),
    )
    if tops:
        job.rate = [_ratable(each, generator) for each in ids]
    if max_tokens:
        decoding = _decoding(body, max_tokens, settings)
        job.requests = _requests(ids, decoding, body, generator, "prompt")
    base = [each["base"] for each in ids]
    echo = [_echo(*each, generator) for each in zip(prompts, base, strict=True)]
    return Prepared(job, base, echo if body.echo else None, n)


def _refuse_completion(
    body: CompletionRequest,
    max_tokens: int,
    n: int,
    generator: Generator,
    settings: ServerSettings,
) -> None:
    """Refuses fields that contradict each other or the settings, before a prompt is encoded."""
    if body.best_of not in (None, n):
        raise ApiError(f"best_of must equal n={n}", param="best_of")
    _check_top("logprobs", body.logprobs, settings)
    _check_top("prompt_logprobs", body.prompt_logprobs, settings)
    _check_members(body, generator, settings)
    if body.begin_token_ids and (body.echo or body.prompt_logprobs is not None):
        raise ApiError("begin_token_ids come without echo and prompt_logprobs", param="echo")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError("prompt_logprobs come without stream", param="prompt_logprobs")
    if max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise ApiError("max_tokens=0 needs echo or prompt_logprobs", param="max_tokens")
    if _prompt_tops(body) and not (settings.prompt_logprobs and can_rate(generator)):
        param = "prompt_logprobs" if body.prompt_logprobs is not None else "echo"
        raise ApiError("this server gives no log-probabilities of prompts", param=param)


def _prompt_tops(body: CompletionRequest) -> list[int]:
    """How many tokens each field wants listed per prompt token; empty if no prompt is rated."""
    wanted = [body.logprobs if body.echo else None, body.prompt_logprobs]
    return [top for top in wanted if top is not None]


def _check_stream(body: CompletionRequest | ChatRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream=true", param="stream_options")


def prepare_chat(body: ChatRequest, generator: Generator, settings: ServerSettings) -> Prepared:
    """The job of POST /v1/chat/completions.

    Raises:
        ApiError: the request cannot be served.
    """
    _check_stream(body)
    n = _samples(body.n or 1, 1, settings)
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    _check_top("top_logprobs", body.top_logprobs, settings)
    _check_members(body, generator, settings)
    _check_continuation(body)
    ids, begun = _conversation(body.messages, generator, "messages", _variables(body, generator))
    ids = _begun(ids, body, generator)
    decoding = _decoding(body, _answer_tokens(body, generator, settings), settings)
    job = Job(
        requests=_requests([ids], decoding, body, generator, "messages", [begun]),
        top=(body.top_logprobs or 0) if body.logprobs else None,
        members_top=body.member_logprobs,
        combination=_combination(body, generator),
        pieces=bool(body.stream or body.return_token_ids),
        streams=bool(body.stream),
    )
    return Prepared(job, [ids["base"]], None, n)


def prepare_response(
    body: ResponsesRequest, generator: Generator, settings: ServerSettings
) -> Prepared:
    """The job of POST /v1/responses.

    Raises:
        ApiError: the request cannot be served.
    """
    _samples(1, 1, settings)
    rated = OUTPUT_LOGPROBS in (body.include or ())
    if body.top_logprobs and not rated:
        raise ApiError(f"top_logprobs needs include={[OUTPUT_LOGPROBS]}", param="top_logprobs")
    _check_top("top_logprobs", body.top_logprobs, settings)
    turns = body.input
    if isinstance(turns, str):
        turns = [InputMessage(role="user", content=turns)]
    if body.instructions is not None:
        turns = [InputMessage(role="system", content=body.instructions), *turns]
    ids, begun = _conversation(turns, generator, "input", _variables(body, generator))
    decoding = _decoding(body, _answer_tokens(body, generator, settings), settings)
    job = Job(
        requests=_requests([ids], decoding, body, generator, "input", [begun]),
        top=(body.top_logprobs or 0) if rated else None,
        combination=_combination(body, generator),
        pieces=bool(body.stream),
        streams=bool(body.stream),
    )
    return Prepared(job, [ids["base"]], None, 1)


def _variables(body: ChatRequest | ResponsesRequest, generator: Generator) -> dict[str, Any] | None:
    """The request's variables for chat templates; refused where no template reads them."""
    try:
        generator.encoder.formats(body.chat_template_kwargs)
    except UserError as error:
        raise ApiError(str(error), param="chat_template_kwargs") from error
    return body.chat_template_kwargs


def _conversation(
    turns: Sequence[Message | InputMessage],
    generator: Generator,
    param: str,
    variables: Mapping[str, Any] | None = None,
) -> tuple[dict[str, list[int]], str]:
    """A conversation as each member reads it, in its own format.

    Args:
        turns: the conversation.
        generator: the system.
        param: the request's field that holds it, for errors.
        variables: of the chat templates.

    Returns:
        Role -> token ids; and the text with which the answer begins, "" for none.
    """
    messages = []
    for turn in turns:
        parts = turn.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if turn.role == "developer" else turn.role
        messages.append({"role": role, "content": text})
    try:
        return generator.encode(messages, variables), begun_answer(messages)
    except (UserError, UnicodeError, TemplateError) as error:
        raise ApiError(str(error), param=param) from error


def _max_tokens(
    body: AnyRequest, generator: Generator, settings: ServerSettings, default: int
) -> int:
    """The limit that a request sets; where it names two, the newer name counts."""
    asked = (getattr(body, name, None) for name in _LIMITS)
    wanted = next((each for each in asked if each is not None), default)
    if wanted == -1:
        return settings.max_tokens or generator.max_positions or UNLIMITED_CONTEXT
    return wanted


def _answer_tokens(
    body: ChatRequest | ResponsesRequest, generator: Generator, settings: ServerSettings
) -> int:
    """The same for a conversation, whose answer may take the rest of the context."""
    wanted = _max_tokens(body, generator, settings, -1)
    if wanted == 0:
        name = next(name for name in _LIMITS if getattr(body, name, None) == 0)
        raise ApiError(f"{name}=0 leaves no answer; it must be at least 1", param=name)
    return wanted


def _check_continuation(body: ChatRequest) -> None:
    """Refuses vLLM's two switches where they ask for what is not done.

    Here the last turn decides: the assistant's is continued, any other is answered.
    """
    continued = body.messages[-1].role == "assistant"
    last = "the assistant's" if continued else f"a {body.messages[-1].role}'s"
    for name, right in (
        ("continue_final_message", continued),
        ("add_generation_prompt", not continued),
    ):
        if getattr(body, name) not in (None, right):
            raise ApiError(
                f"the last turn is {last}, so {name} must be {str(right).lower()}", param=name
            )


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """The request's prompts: a single text, a single list of token ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("prompt is an empty list", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return list(prompt)  # pyright: ignore[reportReturnType]


def _samples(n: int, prompts: int, settings: ServerSettings) -> int:
    """Samples per prompt; refused where one request asks for too many."""
    if n * prompts > settings.max_completions:
        raise ApiError(
            f"n={n} for each of {prompts} prompts is more than the {settings.max_completions} "
            "completions that one request may ask for",
            param="n" if n > 1 else "prompt",
        )
    return n


def _check_top(name: str, top: int | None, settings: ServerSettings) -> None:
    """Refuses to list more tokens than the settings allow; -1 is the whole vocabulary."""
    if top is None or settings.max_logprobs == -1:
        return
    if top == -1 or top > settings.max_logprobs:
        raise ApiError(
            f"{name}={top} is more than this server gives (max_logprobs={settings.max_logprobs})",
            param=name,
        )


def _check_members(
    body: CompletionRequest | ChatRequest, generator: Generator, settings: ServerSettings
) -> None:
    """Refuses the members' log-probabilities where the system does not show them."""
    if body.member_logprobs is None:
        return
    if not generator.shows_members:
        raise ApiError(
            "this system shows no members' log-probabilities; a triple whose models all run in "
            "engine=own does",
            param="member_logprobs",
        )
    _check_top("member_logprobs", body.member_logprobs, settings)


def _begun(
    ids: dict[str, list[int]], body: CompletionRequest | ChatRequest, generator: Generator
) -> dict[str, list[int]]:
    """A prompt, role -> token ids, with the tokens that are to begin its answer."""
    begin = body.begin_token_ids or []
    odd = next((token for token in begin if token >= generator.vocab_size), None)
    if odd is not None:
        raise ApiError(
            f"token {odd} is outside the vocabulary of {generator.vocab_size}",
            param="begin_token_ids",
        )
    return {role: [*own, *begin] for role, own in ids.items()}


def _combination(body: AnyRequest, generator: Generator) -> Combination | None:
    """The request's own formula and alpha; refused where it cannot have them."""
    formula = None
    try:
        if body.formula is not None:
            settings = body.formula.model_dump(exclude={"name"}, exclude_none=True)
            formula = shipped(body.formula.name, settings)
            generator.combination(formula)
    except UserError as error:
        raise ApiError(str(error), param="formula") from error
    try:
        return generator.combination(formula, body.alpha)
    except UserError as error:
        raise ApiError(str(error), param="alpha") from error


def _decoding(body: AnyRequest, max_tokens: int, settings: ServerSettings) -> Decoding:
    """The request's settings; by default they are OpenAI's (temperature 1)."""
    if settings.max_tokens is not None and max_tokens > settings.max_tokens:
        raise ApiError(
            f"max_tokens={max_tokens} is more than this server's limit of {settings.max_tokens}",
            param="max_tokens",
        )
    wanted: dict[str, Any] = {"temperature": 1.0}
    wanted |= body.model_dump(include=_SAMPLING, exclude_none=True)
    if wanted["temperature"] < GREEDY_BELOW or wanted.get("top_p") == 0:
        wanted |= {"temperature": 0.0, "top_p": 1.0}
    if wanted.get("top_k") == -1:  # vLLM's way to keep the whole vocabulary
        wanted["top_k"] = 0
    return make_decoding(max_new_tokens=max_tokens, **wanted)


def _requests(
    ids: Sequence[dict[str, list[int]]],
    decoding: Decoding,
    body: AnyRequest,
    generator: Generator,
    param: str,
    prefixes: Sequence[str] | None = None,
) -> list[Request]:
    """The prompts as requests to the decode loop.

    Args:
        ids: each prompt, role -> token ids.
        decoding: the request's settings.
        body: the request.
        generator: the system.
        param: the request's field that holds the prompts, for errors.
        prefixes: as for `Generator.generate`.
    """
    seed = secrets.randbits(63) if body.seed is None else body.seed
    if decoding.repetition_penalty != 1 and not generator.base.raw_logits:
        raise ApiError(NO_RAW_LOGITS, param="repetition_penalty")
    try:
        requests = generator.requests(ids, decoding, seed=seed, prefixes=prefixes)
    except (UserError, UnicodeError) as error:
        raise ApiError(str(error), param=param) from error
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    odd = next((token for token in bias if token >= generator.vocab_size), None)
    if odd is not None:
        raise ApiError(
            f"token {odd} is outside the vocabulary of {generator.vocab_size}", param="logit_bias"
        )
    # Sampling looks at no limit, so requests that differ in their limits alone share a sampler.
    sampling = replace(decoding, max_new_tokens=1, n=1, stop=(), ignore_eos=False)
    sampler = _sampler(sampling, tuple(sorted(bias.items())))
    return [replace(request, sampler=sampler) for request in requests]


@lru_cache(maxsize=64)
def _sampler(sampling: Decoding, bias: tuple[tuple[int, float], ...]) -> Sampler:
    # Rows that share a sampler are sampled in one go, so clients with equal settings share one.
    return Sampler(sampling, bias=dict(bias))


def _encode(prompt: Prompt, special: bool, generator: Generator) -> dict[str, list[int]]:
    """A prompt as each member reads it; `special` lets tokenizers put their BOS before a text."""
    given: Any = prompt
    try:
        if isinstance(prompt, str) and not special:
            most = generator.max_positions
            given = {
                role: prompt_ids(prompt, member.need_tokenizer(), special=False, most=most)
                for role, member in generator.members.items()
            }
        return generator.encode(given)
    except (UserError, UnicodeError) as error:
        raise ApiError(str(error), param="prompt") from error


def _ratable(ids: dict[str, list[int]], generator: Generator) -> dict[str, list[int]]:
    """Refuses a prompt whose tokens cannot be rated; returns any other."""
    ids = generator.encoder.with_base_ids(ids)
    if not same_tokens(ids):
        raise ApiError("the members' tokenizers differ on this prompt", param="prompt")
    limit = generator.max_positions
    if limit is not None and longest(ids) > limit:
        raise ApiError(
            f"the prompt is {longest(ids)} tokens long; the models read at most {limit}",
            param="prompt",
            code="context_length_exceeded",
        )
    return ids


def _echo(prompt: Prompt, ids: list[int], generator: Generator) -> str:
    """The text of a prompt, which may have come as token ids."""
    if isinstance(prompt, str):
        return prompt
    return (
        generator.members["base"]
        .need_tokenizer()
        .decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
