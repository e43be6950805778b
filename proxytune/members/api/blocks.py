"""How one request scores several positions: by rating its prompt, or by a list of prompts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from proxytune.members.api.answer import Answer, make_answer, values_of
from proxytune.members.api.asking import TRIES, Asker
from proxytune.members.api.distribution import AGREE, NotLogProbs, Watch
from proxytune.members.api.faults import Malformed, Refused
from proxytune.members.api.names import Named
from proxytune.members.api.protocol import Offer, complaint

log = logging.getLogger(__name__)


def with_blocks(asker: Asker, offer: Offer) -> Offer:
    """The offer with a way to score several positions that agrees with single requests.

    Raises:
        NotLogProbs: there is none, and a single request shows that they are no log-probabilities.
    """
    found = None
    if offer.endpoint == "completions" and asker.exact and asker.client.settings.blocks:
        found = _blocks(asker, offer)
    if found is None:
        sharp = asker.tried(offer, asker.sharp)
        fault = None if sharp is None else sharp.values.fault()
        if fault is not None:
            raise NotLogProbs(complaint(asker.client, fault))
    return found or offer


def _blocks(asker: Asker, offer: Offer) -> Offer | None:
    first = make_answer(asker.shown(offer, asker.first).named, asker.names, offer.k)
    if not len(first.ids):
        return None
    ids = [*asker.first, *asker.sharp[_lead(asker) :]]
    for blocks in ("prompt_logprobs", "echo"):
        tried = replace(offer, blocks=blocks)
        try:
            fault = _fault(asker, tried, ids, first)
        except Refused:
            continue
        if fault is None:
            return tried
        log.warning(
            "%s rates prompts by %s otherwise (%s): not used",
            *(asker.client.settings.model, blocks, fault),
        )
    return None


def _lead(asker: Asker) -> int:
    """How many tokens the tokenizer adds before a text."""
    added = asker.tokenizer("")["input_ids"]
    return len(added) if asker.sharp[: len(added)] == list(added) else 0


def _fault(asker: Asker, offer: Offer, ids: Sequence[int], single: Answer) -> str | None:
    """The reason not to use a kind of blocks; None if there is none.

    Args:
        asker: asks the server.
        offer: with the kind of blocks.
        ids: `asker.first`, and more.
        single: the answer of a single request after `asker.first`.
    """
    protocol = asker.protocol(offer)

    def read(answer: Mapping[str, Any]) -> list[list[Named]]:
        try:
            return protocol.lists(answer, ids, 0)
        except (Malformed, KeyError, TypeError, IndexError) as error:
            raise Refused("it does not rate prompts") from error

    body = protocol.body(ids, 0)
    lists = asker.client.ask(offer.endpoint, body, read, len(ids), TRIES)
    watch = Watch()
    answers = [make_answer(each, asker.names, offer.k) for each in lists]
    for token, named, answer in zip(ids, lists, answers, strict=True):
        values = values_of(named, offer.k, asker.names.vocab_size)
        fault = watch.fault(values, token, answer.ids)
        if fault is not None:
            return fault
    return None if _agree(single, answers[len(asker.first) - 1]) else "other values"


def _agree(one: Answer, other: Answer) -> bool:
    """Whether two answers for one position agree on the likeliest token's log-probability."""
    token = int(one.ids[one.logprobs.argmax()])
    theirs = dict(zip(other.ids.tolist(), other.logprobs.tolist(), strict=True))
    return token in theirs and abs(theirs[token] - float(one.logprobs.max())) < AGREE
