"""Whether a server's lists are the model's own log-probabilities, and the way to ask for them.

distribution.py has the arithmetic on one list; here lists are compared. One position is asked for
at temperature 0 and at temperature 1, and with k and fewer tokens; two positions must differ; and
where the server lists the whole vocabulary, that sums to 1.
"""

import logging
from dataclasses import replace

import numpy as np

from proxytune.engine.truncation import MAX_ASKED
from proxytune.errors import UserError
from proxytune.members.api.answer import make_answer
from proxytune.members.api.asking import TRIES, Asker, Shown
from proxytune.members.api.distribution import AGREE, NotLogProbs
from proxytune.members.api.faults import Refused
from proxytune.members.api.protocol import SAMPLING, Offer, complaint

log = logging.getLogger(__name__)

_LESS = 0.99  # a sum below this is not 1
_ROUNDING = 2.0**-6  # relative difference of two values in bfloat16, far down in a list
_COMPARED = 5  # of the listed tokens with the same tokens by their ids


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


def check_vocabulary(asker: Asker, offer: Offer) -> None:
    """Compares the texts that the server writes with the triple's tokens of the ids that it names.

    Token ids are sent and listed, so a server of another vocabulary would answer, too.

    Raises:
        UserError: all texts differ.
    """
    if not asker.exact or offer.sampling != "greedy":
        return
    others = []
    for ids in (asker.first, asker.open, asker.sharp):
        shown = asker.tried(offer, ids)
        known = [each for each in shown.named if each.logprob is not None] if shown else []
        best = max(known, key=lambda each: each.logprob or 0.0, default=None)
        written = ((shown.text if shown else None) or "").strip()
        if best is None or not written or "\ufffd" in written:
            continue
        tokens = asker.names.ids(best)
        own = [asker.tokenizer.decode([token]).strip() for token in tokens] or [best.text.strip()]
        if written in own:
            return
        others.append(
            f"{best.key!r} is {own[0]!r} to the triple, and the server writes {written!r}"
        )
    if others:
        raise UserError(
            f"{asker.client.settings.base_url} serves a model of another vocabulary: {others[0]}; "
            "triple.base.id must name the served model's own tokenizer"
        )


def _fault(asker: Asker, offer: Offer) -> str | None:
    """The reason why lists asked for in this way are no log-probabilities; None if they are."""
    first = asker.shown(offer, asker.first)
    fault = first.values.fault()
    if fault is not None:
        return fault
    other = asker.tried(offer, asker.open)
    if other is not None and other.content == first.content and len(first.content) > 1:
        return "the same values at different positions"
    if _penalised(asker, offer):
        return "values that change with the tokens before (a penalty of the server's own)"
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


def _penalised(asker: Asker, offer: Offer) -> bool:
    """Whether a server's own penalties change what it lists after a repeated word."""
    neutral = replace(offer, sampling="unfiltered")
    if offer.endpoint != "completions" or offer == neutral:
        return False
    without = asker.tried(neutral, asker.sharp)
    own = None if without is None else asker.tried(offer, asker.sharp)
    if own is None or without is None or without.values.fault() is not None:
        return False
    values = without.content
    pairs = [(value, values[key]) for key, value in own.content.items() if key in values]
    exact = not any(each.by_text for each in own.named)  # a text may stand for another token
    return exact and any(abs(a - b) > AGREE + _ROUNDING * abs(b) for a, b in pairs)


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


def answers_single_tokens(asker: Asker, offer: Offer) -> bool:
    """Whether the server answers for tokens by their ids, listed or not, and as its lists do.

    It is asked for as many as a run may ask for, some that it lists among them.
    """
    if offer.endpoint != "completions" or offer.k == -1 or not asker.exact:
        return False
    answer = make_answer(asker.shown(offer, asker.first).named, asker.names, offer.k)
    size = asker.names.vocab_size
    listed = answer.ids[answer.logprobs.argsort()[::-1]].tolist()[:_COMPARED]
    spread = np.linspace(size - 1, 0, min(size, MAX_ASKED)).astype(int).tolist()
    tokens = list(dict.fromkeys([*listed, *spread]))[:MAX_ASKED]
    try:
        found = asker.protocol(offer).ask_for(asker.first, tokens, TRIES)
    except (Refused, NotLogProbs) as error:
        log.debug("no answer for single tokens: %s", error)
        return False
    known, bounds = answer.known, answer.ceiling(size)
    agree = all(token in found and abs(found[token] - known[token]) < AGREE for token in listed)
    further = [token for token in found if token not in known]
    low = all(value < float(bounds[token]) + AGREE for token, value in found.items())
    return agree and low and len({found[token] for token in further}) > 1
