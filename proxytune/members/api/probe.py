"""Finds out what a server offers (endpoint, number of log-probabilities, blocks) by asking once.

Also writes the requests that use the offer, and reads their answers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxytune.errors import UserError
from proxytune.members.api.answer import Answer, make_answer
from proxytune.members.api.client import Client, Malformed, Refused
from proxytune.members.api.names import Named, TokenNames

log = logging.getLogger(__name__)

AUTO = (100, 50, 20, 10, 5, 3, 2, 1)  # tokens per position that "auto" asks for, in this order
_AGREE = 0.25  # two requests for one log-probability may differ by this much (bfloat16)


@dataclass(frozen=True)
class Offer:
    """The log-probabilities that a server gives.

    Attributes:
        endpoint: "completions", or "chat/completions" (which shows the first token only).
        k: tokens listed at each position; -1 is the whole vocabulary.
        blocks: the field by which it gives log-probabilities of a prompt's tokens:
            "prompt_logprobs" (vLLM's) or "echo" (OpenAI's); None if it gives none.
        token_ids: whether it names tokens by their ids on request.
    """

    endpoint: str
    k: int
    blocks: str | None
    token_ids: bool

    def __str__(self) -> str:
        listed = "every token" if self.k == -1 else f"the {self.k} likeliest tokens"
        places = f"many places ({self.blocks})" if self.blocks else "one place"
        return f"{listed}, of {places} per request to {self.endpoint}"


class Protocol:
    """Requests for log-probabilities in the form that the server understands.

    Args:
        client: sends them.
        names: finds the ids of listed tokens.
        offer: the log-probabilities that the server gives.
        tokenizer: writes prompts for servers that want text.
    """

    def __init__(self, client: Client, names: TokenNames, offer: Offer, tokenizer: Any) -> None:
        self.client = client
        self.names = names
        self.offer = offer
        self._tokenizer = tokenizer

    def ask(self, ids: Sequence[int], start: int) -> list[Answer]:
        """The answers after ids[: start + 1], ids[: start + 2], ..., `ids`, by one request.

        Raises:
            ValueError, OSError: see `Client.ask`.
        """
        if start < len(ids) - 1:
            assert self.offer.blocks is not None
        body = self.body(ids, block=start < len(ids) - 1)

        def read(answer: Mapping[str, Any]) -> list[Answer]:
            choice = answer["choices"][0]
            lists = self.rated(choice, ids, start + 1) if start < len(ids) - 1 else []
            lists.append(_generated(choice))
            return [make_answer(each, self.names, self.offer.k) for each in lists]

        return self.client.ask(self.offer.endpoint, body, read, len(ids))

    def body(self, ids: Sequence[int], block: bool) -> dict[str, Any]:
        """The request for the position after `ids`; with `block`, for those before it, too."""
        settings = self.client.settings
        body: dict[str, Any] = {"model": settings.model, "max_tokens": 1, "temperature": 0}
        if self.offer.endpoint == "chat/completions" or settings.foreign_tokenizer:
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            if self.offer.endpoint == "chat/completions":
                body["messages"] = [{"role": "user", "content": text}]
                return body | {"logprobs": True, "top_logprobs": self.offer.k}
            body["prompt"] = text
        else:
            body["prompt"] = list(map(int, ids))
        body["logprobs"] = self.offer.k
        if self.offer.token_ids:
            body["return_tokens_as_token_ids"] = True
        if block and self.offer.blocks == "echo":
            body["echo"] = True
        elif block:
            body["prompt_logprobs"] = self.offer.k
        return body

    def rated(self, choice: Mapping[str, Any], ids: Sequence[int], first: int) -> list[list[Named]]:
        """The listed tokens at the positions `first`, `first` + 1, ... of the prompt."""
        if self.offer.blocks == "echo":
            lists = choice["logprobs"]["top_logprobs"][: len(ids)]
            if len(choice["logprobs"]["top_logprobs"]) != len(ids) + 1:
                raise Malformed(f"{len(lists)} places rated for a prompt of {len(ids)} tokens")
            return [_from_map(listed) for listed in lists[first:]]
        lists = choice["prompt_logprobs"]
        if len(lists) != len(ids) or any(
            str(token) not in rated for token, rated in zip(ids[1:], lists[1:], strict=True)
        ):
            raise Malformed("the prompt that was rated is not the one that was sent")
        return [
            [Named(each["logprob"], id=int(i)) for i, each in listed.items()]
            for listed in lists[first:]
        ]


def _generated(choice: Mapping[str, Any]) -> list[Named]:
    """The listed tokens at the position of the one generated token."""
    logprobs = choice["logprobs"]
    if logprobs is None:
        raise Malformed("no log-probabilities")
    if logprobs.get("content") is not None:  # chat, and llama.cpp's completions
        return [
            Named(each["logprob"], each.get("token", ""), each.get("id"), each.get("bytes"))
            for each in logprobs["content"][-1]["top_logprobs"]
        ]
    return _from_map(logprobs["top_logprobs"][-1])


def _from_map(listed: Mapping[str, float] | None) -> list[Named]:
    if not listed:
        raise Malformed("a place without log-probabilities")
    return [Named(float(logprob), text) for text, logprob in listed.items()]


def find_offer(client: Client, names: TokenNames, tokenizer: Any) -> Offer:
    """The most that the server offers within the settings; asked once, then kept in the store.

    Raises:
        UserError: it shows no log-probabilities, or fewer than the settings ask for.
    """
    settings = client.settings
    name = f"offer {settings.model} {settings.top_logprobs} {settings.endpoint} {settings.blocks}"
    known = client.store.fact(name)
    if known is not None:
        return Offer(**known)
    offer = _ask_offer(client, names, tokenizer)
    client.store.note(name, asdict(offer))
    log.info("%s shows %s", settings.base_url, offer)
    return offer


def _ask_offer(client: Client, names: TokenNames, tokenizer: Any) -> Offer:
    settings = client.settings
    wanted = settings.top_logprobs
    ks = AUTO if wanted == "auto" else (int(wanted),)
    endpoints = {
        "auto": ("completions", "chat/completions"),
        "completions": ("completions",),
        "chat": ("chat/completions",),
    }[settings.endpoint]
    ids = tokenizer("The capital of France is")["input_ids"]
    refusals: list[str] = []
    for endpoint in endpoints:
        answered = False
        for k, token_ids in _ways(endpoint, ks):
            offer = Offer(endpoint, k, None, token_ids)
            try:
                shown, first = _shown(client, names, offer, tokenizer, ids)
            except Refused as error:
                refusals.append(str(error))
                continue
            answered = True
            if shown < (k if k > 0 else names.vocab_size) and wanted != "auto":
                refusals.append(f"it lists {shown} tokens where {k} were asked for")
                continue
            offer = Offer(endpoint, k if k < 0 else min(k, shown), None, token_ids)
            return _with_blocks(client, names, offer, tokenizer, ids, first)
        if answered:  # the chat endpoint shows no more, and first tokens only
            break
    raise UserError(
        f"{settings.base_url} does not show the log-probabilities that are asked for "
        f"(triple.base.api.top_logprobs={wanted}): {refusals[-1] if refusals else 'it refuses'}"
    )


def _ways(endpoint: str, ks: Sequence[int]) -> list[tuple[int, bool]]:
    """(Number of listed tokens, whether to ask for their ids), the best pair first."""
    if endpoint == "completions":
        return [(k, token_ids) for k in ks for token_ids in (True, False)]
    return [(k, False) for k in ks if k > 0]


def _shown(
    client: Client, names: TokenNames, offer: Offer, tokenizer: Any, ids: Sequence[int]
) -> tuple[int, Answer]:
    """How many tokens one answer lists, and the answer."""
    protocol = Protocol(client, names, offer, tokenizer)

    def read(answer: Mapping[str, Any]) -> tuple[int, Answer]:
        try:
            listed = _generated(answer["choices"][0])
        except (Malformed, KeyError, TypeError) as error:
            raise Refused("it answers without log-probabilities") from error
        shown = len(listed)
        if shown > offer.k / 2 and any(len(names.ids(named)) > 1 for named in listed):
            shown = max(shown, offer.k)  # tokens that share a name are one entry of the list
        return shown, make_answer(listed, names, offer.k)

    return client.ask(offer.endpoint, protocol.body(ids, block=False), read, len(ids))


def _with_blocks(
    client: Client,
    names: TokenNames,
    offer: Offer,
    tokenizer: Any,
    ids: Sequence[int],
    first: Answer,
) -> Offer:
    """The offer with the first kind of blocks that agrees with `first`, one position's answer."""
    if offer.endpoint != "completions" or client.settings.foreign_tokenizer:
        return offer
    if not client.settings.blocks or not len(first.ids):
        return offer
    longer = [*ids, int(first.ids[first.logprobs.argmax()])]
    for blocks in ("prompt_logprobs", "echo"):
        tried = Offer(offer.endpoint, offer.k, blocks, offer.token_ids)
        protocol = Protocol(client, names, tried, tokenizer)

        def read(answer: Mapping[str, Any], protocol: Protocol = protocol) -> list[Named]:
            try:
                return protocol.rated(answer["choices"][0], longer, len(longer) - 1)[0]
            except (Malformed, KeyError, TypeError, IndexError) as error:
                raise Refused("it does not rate prompts") from error

        try:
            body = protocol.body(longer, block=True)
            rated = client.ask(offer.endpoint, body, read, len(longer))
        except Refused:
            continue
        again = make_answer(rated, names, offer.k)
        if _agree(first, again):
            return tried
        log.warning("%s rates prompts by %s differently; not used", client.settings.model, blocks)
    return offer


def _agree(one: Answer, other: Answer) -> bool:
    """Whether two answers for one position agree on the likeliest token's log-probability."""
    token = int(one.ids[one.logprobs.argmax()])
    theirs = dict(zip(other.ids.tolist(), other.logprobs.tolist(), strict=True))
    return token in theirs and abs(theirs[token] - float(one.logprobs.max())) < _AGREE
