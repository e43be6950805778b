"""Our requests as vLLM's, and vLLM's log-probabilities as ours."""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from proxytune.engine.combining import Combination
from proxytune.engine.logprobs import LOWEST, TokenLogprob
from proxytune.engine.rows import Row, longest
from proxytune.engine.system import Prompt
from proxytune.errors import UserError
from proxytune.vllm.plugin import KEY

Asked = tuple[Any, SamplingParams]  # vLLM's prompt, and how it goes on


def own_prompts(prompt: Prompt) -> bool:
    """Whether the members read different tokens."""
    return any(list(ids) != list(prompt["base"]) for ids in prompt.values())


def completion(row: Row, ours: bool) -> Asked:
    """One sample of one prompt as a request of vLLM.

    Args:
        row: the sample; it has written nothing yet.
        ours: whether our sampler chooses (`sampling.py`); else vLLM's does, seeded by the sample's
            stream.
    """
    request = row.request
    settings: dict[str, Any] = {"temperature": 0.0}
    extra: dict[str, Any] = {}
    if ours:
        sampler = request.sampler
        extra = {"sampler": json.dumps(sampler.to_dict()), "stream": row.stream, "seen": []}
        if sampler.looks_back:
            extra["seen"] = request.seen.tolist()
    else:
        settings = _their_settings(row)
    params = SamplingParams(
        **settings,
        max_tokens=request.max_new_tokens,
        stop_token_ids=sorted(request.eos_ids),
        ignore_eos=True,  # every end token of ours is in that list
        detokenize=False,
        logprobs=request.top,
        output_kind=RequestOutputKind.DELTA,
    )
    return _asked(request.prompt, request.combination, params, extra)


def _their_settings(row: Row) -> dict[str, Any]:
    """The settings of vLLM's own sampler."""
    given = row.request.sampler.to_dict()
    settings = dict(given["decoding"])
    if given["choices"]:
        settings["allowed_token_ids"] = given["choices"]
    if given["bias"]:
        settings["logit_bias"] = dict(given["bias"])
    if settings["temperature"] > 0:
        settings["seed"] = row.stream & (2**63 - 1)  # vLLM takes signed numbers
    return settings


def rating(prompt: Prompt, own: Combination | None, top: int) -> Asked:
    """A prompt whose tokens get their log-probabilities, those of the `top` likeliest besides."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=top,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return _asked(prompt, own, params, {})


def scoring(prompt: Prompt, continuation: Sequence[int]) -> Asked:
    """A prompt and its continuation; the last token of it is rated as vLLM's next one.

    So no member reads the last token, which may lie beyond its positions.
    """
    read = list(continuation[:-1])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        logprob_token_ids=[continuation[-1]],
        prompt_logprobs=1,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return _asked({role: [*ids, *read] for role, ids in prompt.items()}, None, params, {})


def _asked(
    prompt: Prompt, own: Combination | None, params: SamplingParams, extra: dict[str, Any]
) -> Asked:
    """The prompt as vLLM counts it: as long as the longest member's (`roles.py`)."""
    base = list(prompt["base"])
    filler = [base[0]] * (longest(prompt) - len(base))  # a token that a penalty counts anyway
    asked: dict[str, Any] = {"type": "token", "prompt_token_ids": [*filler, *base]}
    if own_prompts(prompt):
        extra["prompts"] = {role: list(ids) for role, ids in prompt.items()}
        # A shorter member writes its output into slots that vLLM counts as shared prompt.
        asked["cache_salt"] = uuid.uuid4().hex
    if own is not None:
        extra["alpha"] = own.alphas["alpha"]
    params.extra_args = {KEY: extra} if extra else None
    return asked, params


class Listed:
    """The log-probabilities that vLLM lists in one place.

    Args:
        entries: token id -> vLLM's Logprob.
        vocab_size: entries that count; vLLM lists the padding of the vocabulary, too.
    """

    def __init__(self, entries: Mapping[int, Any], vocab_size: int) -> None:
        self._entries = {i: each for i, each in entries.items() if i < vocab_size}

    @cached_property
    def _ranked(self) -> list[tuple[int, float]]:
        ranked = sorted(self._entries.items(), key=lambda item: item[1].rank or len(self._entries))
        return [(token, max(LOWEST, _log(entry))) for token, entry in ranked]

    @property
    def best(self) -> int:
        """The likeliest token."""
        return self._ranked[0][0]

    def logprob(self, token: int) -> float:
        """The log-probability of a token that is listed; minus infinity where it has none."""
        return _log(self._entries[token])

    def rate(self, token: int, top: int) -> TokenLogprob:
        """The rating of a token that is listed; `top` is -1 for the whole vocabulary."""
        entry = self._entries[token]
        listed = self._ranked if top < 0 else self._ranked[:top]
        return TokenLogprob(token, max(LOWEST, _log(entry)), entry.rank, listed)


def _log(entry: Any) -> float:
    """A log-probability of vLLM's.

    Raises:
        UserError: it is NaN.
    """
    if math.isnan(entry.logprob):
        raise UserError(
            "a model gives no probabilities (a logit is NaN or infinite); load it in another dtype "
            "(bfloat16 or float32), and check its weights"
        )
    return entry.logprob
