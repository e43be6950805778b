"""How one request scores several positions: by rating its prompt, or by a list of prompts."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from proxytune.members.api.answer import make_answer, values_of
from proxytune.members.api.asking import TRIES, Asker
from proxytune.members.api.distribution import NotLogProbs, Watch
from proxytune.members.api.faults import Malformed, Refused
from proxytune.members.api.names import Named
from proxytune.members.api.protocol import Offer, complaint, lead

log = logging.getLogger(__name__)

RATED = ("prompt_logprobs", "echo")
_LONG = 384  # tokens of the prompt by which the kinds of blocks are measured
_WIDTH = 5  # tokens of the measured block
_YIELD = 2.0  # tokens of a block that are right: so many single requests take its place
_CLEARLY = 2 / 3  # of the time
_SLOW = 1.0  # seconds for the measured block


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
    """The cheapest kind of blocks that agrees with a single request; None for token by token."""
    settings = asker.client.settings
    if not len(make_answer(asker.shown(offer, asker.first).named, asker.names, offer.k).ids):
        return None
    ids = [*asker.first, *asker.sharp[lead(asker.sharp, asker.tokenizer) :]]
    rated = next(filter(None, (_agreeing(asker, offer, kind, ids) for kind in RATED)), None)
    if settings.prompt_price or settings.max_tokens or settings.max_cost:
        return rated  # a list of prompts reads, and pays for, the same tokens again and again
    if rated is not None and settings.max_requests is not None:
        return rated
    listed = _agreeing(asker, offer, "prompts", ids[: len(asker.first) + 3])
    if listed is None or settings.max_requests is not None:
        return rated or listed
    return _fastest(asker, offer, rated, listed)


def _agreeing(asker: Asker, offer: Offer, kind: str, ids: Sequence[int]) -> Offer | None:
    """The offer with a kind of blocks; None where the server lacks it, or answers otherwise."""
    tried = replace(offer, blocks=kind)
    try:
        fault = _fault(asker, tried, ids)
    except Refused:
        return None
    if fault is None:
        return tried
    model = asker.client.settings.model
    log.warning("%s answers blocks by %s otherwise (%s): not used", model, kind, fault)
    return None


def _fastest(asker: Asker, offer: Offer, rated: Offer | None, listed: Offer) -> Offer | None:
    """The way that takes least time per token, by requests after a prompt that was just read.

    A server that rates a prompt reads all of it again, and finds the prompts of a list, and single
    ones, in its prefix cache where it has one. Rated prompts are kept unless they are slow, and
    token by token is where there are none, unless another way is clearly faster.
    """
    room = asker.client.max_positions or 2 * _LONG
    text = [*asker.first, *asker.sharp[lead(asker.sharp, asker.tokenizer) :]]
    prompt = (text * (_LONG // len(text) + 1))[: min(_LONG, room - 2 * _WIDTH - 2)]
    if len(prompt) < len(asker.first):
        return rated
    costs = [math.inf, math.inf, math.inf]
    ways = [rated or offer, listed, offer]
    for place, way in enumerate(ways):
        single = way is offer
        try:
            seconds = _seconds(asker, way, prompt, 1 if single else _WIDTH)
        except (Refused, Malformed):
            continue
        costs[place] = _YIELD * seconds if single else seconds
        if rated is not None and costs[0] < _SLOW:
            return rated
    log.info("seconds for a block: %s", dict(zip(("rated", "list", "single"), costs, strict=True)))
    best = min(range(3), key=lambda place: costs[place])
    chosen = ways[best if costs[best] < _CLEARLY * costs[0] else 0]
    return None if chosen is offer else chosen


def _seconds(asker: Asker, offer: Offer, prompt: Sequence[int], width: int) -> float:
    """The seconds that one request takes for `width` positions after a prompt, the better of two.

    The prompt and the block's first token are read before, as in a row that is being written.
    """
    protocol, best = asker.protocol(offer), math.inf
    for token in prompt[-2:]:
        ids = [*prompt, token]
        protocol.ask(ids, len(ids) - 1)
        longer = [*ids, *prompt[:width]]
        start = time.perf_counter()
        protocol.ask(longer, len(longer) - width)
        best = min(best, time.perf_counter() - start)
    return best


def _fault(asker: Asker, offer: Offer, ids: Sequence[int]) -> str | None:
    """The reason not to use a kind of blocks; None if there is none.

    Args:
        asker: asks the server.
        offer: with the kind of blocks.
        ids: `asker.first`, and more.
    """
    protocol = asker.protocol(offer)
    place = len(asker.first) - 1
    added = lead(ids, asker.tokenizer)  # tokens that have no list at some servers
    start = place if offer.blocks == "prompts" else min(added, place)

    def read(answer: Mapping[str, Any]) -> list[list[Named]]:
        try:
            return protocol.lists(answer, ids, start)
        except (Malformed, KeyError, TypeError, IndexError) as error:
            raise Refused("it does not rate prompts") from error

    body = protocol.body(ids, start)
    lists = asker.client.ask(offer.endpoint, body, read, len(ids), TRIES)
    watch = Watch()
    answers = [make_answer(each, asker.names, offer.k) for each in lists]
    for token, named, answer in zip(ids[start:], lists, answers, strict=True):
        values = values_of(named, offer.k, asker.names.vocab_size)
        fault = watch.fault(values, token, answer.ids)
        if fault is not None:
            return fault
    single = make_answer(asker.shown(offer, asker.first).named, asker.names, offer.k)
    return None if single.agrees(answers[place - start]) else "other values"
