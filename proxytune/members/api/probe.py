"""Finds out what a server offers (endpoint, log-probabilities, blocks) by asking.

asking.py sends the requests, verify.py tests what the server lists before it is used, and blocks.py
chooses how several positions are scored. For a server that lists the model's log-probabilities all
this takes about eight requests; the result is kept in the store.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from proxytune.errors import UserError
from proxytune.members.api.answer import make_answer
from proxytune.members.api.asking import TRIES, Asker, Shown
from proxytune.members.api.blocks import with_blocks
from proxytune.members.api.client import Client
from proxytune.members.api.distribution import NotLogProbs
from proxytune.members.api.faults import Refused
from proxytune.members.api.names import TokenNames
from proxytune.members.api.protocol import Offer, complaint
from proxytune.members.api.reading import counted_by
from proxytune.members.api.verify import answers_single_tokens, check_vocabulary, trusted

log = logging.getLogger(__name__)

AUTO = (100, 50, 20, 10, 5, 3, 2, 1)  # tokens per position that "auto" asks for, in this order
_FORM = "4"  # of `Offer`, and of the tests that it has passed


def find_offer(client: Client, names: TokenNames, tokenizer: Any) -> Offer:
    """The most that the server offers within the settings; asked once, then kept in the store.

    Raises:
        NotLogProbs: what it lists are no log-probabilities.
        UserError: it shows none, or fewer than the settings ask for.
    """
    settings = client.settings
    name = f"offer {_FORM} {settings.model} {settings.top_logprobs} {settings.endpoint} "
    name += str(settings.blocks)
    known = client.store.fact(name)
    if known is not None:
        return Offer(**known)
    asker = Asker(client, names, tokenizer)
    offer = trusted(asker, _Listing(asker).find())
    check_vocabulary(asker, offer)
    offer = with_blocks(asker, offer)
    offer = replace(offer, asks=answers_single_tokens(asker, offer))
    client.store.note(name, asdict(offer))
    log.info("%s shows %s", settings.base_url, offer)
    return offer


class _Listing:
    """Finds the request that lists the most tokens."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.settings = asker.client.settings
        self._refusals: list[str] = []

    def find(self) -> Offer:
        """The way of asking; see `find_offer`."""
        endpoints = {
            "auto": ("completions", "chat/completions"),
            "completions": ("completions",),
            "chat": ("chat/completions",),
        }[self.settings.endpoint]
        for endpoint in endpoints:
            offer = self._listing(endpoint)
            if offer is not None:
                return replace(offer, lacking=self._said())
        wanted = self.settings.top_logprobs
        raise UserError(
            f"{self.settings.base_url} does not show the log-probabilities that are asked for "
            f"(triple.base.api.top_logprobs={wanted}): "
            f"{self._said() or 'it refuses'}"
        )

    def _said(self) -> str:
        """What the server said when it refused."""
        return "; ".join(dict.fromkeys(self._refusals[-3:]))

    def _listing(self, endpoint: str) -> Offer | None:
        """The way of asking that lists the most tokens; None if there is none."""
        chat = endpoint == "chat/completions"
        form: tuple[bool, bool] | None = (False, not chat)  # text, names of tokens by their ids
        known = chat or self.settings.foreign_tokenizer
        for k, asked in self._counts(chat):
            text, token_ids = form
            offer = Offer(endpoint, k, None, token_ids, asked, text)
            shown = self._listed(offer)
            if shown is None and not known:
                known = True
                form = self._form(endpoint)
                if form is None:
                    return None
                if form != (text, token_ids):
                    offer = replace(offer, text=form[0], token_ids=form[1])
                    shown = self._listed(offer)
            if shown is None and offer.token_ids:
                offer = replace(offer, token_ids=False)
                shown = self._listed(offer)
            if shown is None:
                continue
            counts = shown.counted == len(self.asker.first)
            counted = self._counted(replace(offer, counts=counts), shown)
            if counted is not None:
                return counted
        return None

    def _listed(self, offer: Offer) -> Shown | None:
        """What the first position lists; None where the server refuses."""
        try:
            return self.asker.shown(offer, self.asker.first)
        except Refused as error:
            self._refusals.append(str(error))
            return None

    def _counts(self, chat: bool) -> Sequence[tuple[int, int | None]]:
        """(k, the number in the request if it is another one), those that list most first."""
        wanted, whole = self.settings.top_logprobs, self.asker.names.vocab_size
        if wanted == "auto":
            return [(k, None) for k in AUTO]
        if wanted != -1:
            return [(wanted, None)]
        # a model may have more logits than the tokenizer has tokens
        return [] if chat else [(-1, None), (-1, whole), (-1, whole + 1024)]

    def _counted(self, offer: Offer, shown: Shown) -> Offer | None:
        """The offer with the number of tokens that are listed; None if they are too few."""
        whole = self.asker.names.vocab_size
        listed = len(make_answer(shown.named, self.asker.names, -1).ids)
        if listed == whole:
            asked = offer.k if offer.asked is None else offer.asked
            return replace(offer, k=-1, asked=None if asked == -1 else asked)
        count = listed if offer.k == -1 else shown.count()
        wanted = whole if offer.k == -1 else offer.k
        if count >= wanted:
            return offer
        if self.settings.top_logprobs == "auto":
            return replace(offer, k=count)
        fault = shown.values.fault()
        if fault is not None:
            raise NotLogProbs(complaint(self.asker.client, fault))
        self._refusals.append(f"it lists {count} tokens where {wanted} were asked for")
        return None

    def _form(self, endpoint: str) -> tuple[bool, bool] | None:
        """Whether prompts go as text, and whether tokens are named by ids on request.

        None if the server takes neither text nor token ids.
        """
        ids = self.asker.first
        for text, token_ids in itertools.product((False, True), (True, False)):
            offer = Offer(endpoint, 1, None, token_ids, text=text)
            body = self.asker.protocol(offer).body(ids)
            del body["logprobs"]

            def read(answer: Mapping[str, Any]) -> int | None:
                answer["choices"][0]
                return counted_by(answer)

            try:
                counted = self.asker.client.ask(endpoint, body, read, len(ids), TRIES)
            except Refused as error:
                self._refusals.append(f"a prompt of {'text' if text else 'token ids'}: {error}")
                continue
            if counted in (None, len(ids)):
                if text:
                    log.warning("%s takes no token ids: it gets text", self.settings.base_url)
                return text, token_ids
            self._refusals.append(f"it reads {counted} tokens in a prompt of {len(ids)}")
        return None
