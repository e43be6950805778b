"""Whether a server's lists are the model's own log-probabilities, and the way to ask for them.

distribution.py has the arithmetic on one list; here lists are compared. One position is asked for
at temperature 0 and at temperature 1, and with k and fewer tokens; two positions must differ; and
where the server lists the whole vocabulary, that sums to 1.
"""

import logging
from dataclasses import replace

import numpy as np

from proxytune.members.api.asking import Asker, Shown
from proxytune.members.api.distribution import NotLogProbs
from proxytune.members.api.faults import Refused
from proxytune.members.api.protocol import SAMPLING, Offer, complaint

log = logging.getLogger(__name__)

_LESS = 0.99  # a sum below this is not 1


def trusted(asker: Asker, offer: Offer) -> Offer:
    """The offer with the way of sampling whose lists are the model's log-probabilities.

    Raises:
        NotLogProbs: there is none.
        Refused: the server answered once, and then no more.
    """
    found: list[str] = []
    for sampling in SAMPLING:
        tried = replace(offer, sampling=sampling)
        try:
            fault = _fault(asker, tried)
        except Refused as error:
            if not found:
                raise
            log.debug("%s sampling is refused: %s", sampling, error)
            continue
        if fault is None:
            if found:
                url = asker.client.settings.base_url
                log.warning("%s lists %s: it is asked at temperature 1", url, found[0])
            return tried
        found.append(fault)
    raise NotLogProbs(complaint(asker.client, found[0]))


def _fault(asker: Asker, offer: Offer) -> str | None:
    """The reason why lists asked for in this way are no log-probabilities; None if they are."""
    first = asker.shown(offer, asker.first)
    fault = first.values.fault()
    if fault is not None:
        return fault
    other = asker.tried(offer, asker.open)
    if other is not None and other.content == first.content and len(first.content) > 1:
        return "the same values at different positions"
    shorter = _shorter(asker, offer)
    if shorter is not None and _normalised(shorter, first):
        return "values that sum to 1 whatever the length of the list"
    if shorter is not None and shorter.values.fault() is None and not first.agrees(shorter):
        return "values that change with the temperature, or with the length of the list"
    whole = _whole(asker, offer)
    lists = [shown for shown in (first, other, whole) if shown is not None]
    for shown in lists[1:]:
        fault = shown.values.fault()
        if fault is not None:
            return fault
    if whole is not None and other is not None and _normalised(other, whole):
        return "values that sum to 1 whatever the length of the list"
    if sum(shown.values.sums_to_one() for shown in lists) > 1:
        return "tokens that sum to exactly 1, though they are not all of the vocabulary"
    if all(shown.values.flat for shown in lists):
        return "one value for every token but the likeliest"
    return None


def _normalised(short: Shown, long: Shown) -> bool:
    """Whether a list sums to 1 whose tokens have less in a longer list for their position."""
    if not short.values.sums_to_one():
        return False
    return float(np.exp(long.values.values[: len(short.values.values)]).sum()) < _LESS


def _shorter(asker: Asker, offer: Offer) -> Shown | None:
    """A quarter of the first position's list, at temperature 1."""
    sampling = "plain" if offer.sampling == "greedy" else offer.sampling
    if offer.k == -1:
        return asker.tried(replace(offer, sampling=sampling), asker.first)
    count = max(1, offer.k // 4)
    return asker.tried(replace(offer, k=count, asked=None, sampling=sampling), asker.first)


def _whole(asker: Asker, offer: Offer) -> Shown | None:
    """The whole vocabulary at the open position, where the server lists it."""
    if offer.endpoint != "completions" or offer.k == -1:
        return None
    whole = replace(offer, k=asker.names.vocab_size, asked=None)
    return asker.tried(whole, asker.open)
