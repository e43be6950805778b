"""Single requests of the probe, and what they list."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.engine.text import encoded
from proxytune.members.api.answer import values_of
from proxytune.members.api.client import Client
from proxytune.members.api.distribution import AGREE, Listed
from proxytune.members.api.faults import Malformed, Refused
from proxytune.members.api.names import Named, TokenNames
from proxytune.members.api.protocol import FIRST, Offer, Protocol
from proxytune.members.api.reading import counted_by, generated

TRIES = 2  # of a request that ends in a server's error
# Beside `FIRST`: a position that leaves everything open, and one that leaves little, and repeats
# tokens, so that penalties on these show.
OPEN, SHARP = "The", " 1, 2, 3, 4, 5, 6,"
_COMPARED = 5  # of the likeliest tokens that two lists have in common


@dataclass(frozen=True)
class Shown:
    """One answer to the probe.

    Attributes:
        named: the listed tokens.
        values: their log-probabilities.
        counted: the server's count of the prompt's tokens; None if it gives none.
        text: the text that the server wrote, of one token; None if it gives none.
    """

    named: Sequence[Named]
    values: Listed
    counted: int | None
    text: str | None = None

    @property
    def content(self) -> dict[int | str | tuple[int, ...], float]:
        """Name -> log-probability, the likeliest first."""
        known = [(each.key, each.logprob) for each in self.named if each.logprob is not None]
        return dict(sorted(known, key=lambda pair: -pair[1]))

    def count(self) -> int:
        """How many tokens are listed; those that share a text are one entry of the list."""
        asked = self.values.asked
        merged = any(each.by_text for each in self.named) and len(self.named) > asked / 2
        return max(len(self.named), asked) if merged else len(self.named)

    def agrees(self, other: "Shown") -> bool:
        """Whether both lists have the likeliest tokens of either with the same values.

        A text may stand for another token in the other list: then half of the texts must agree.
        """
        mine, theirs = self.content, other.content
        if not mine or not theirs:
            return False
        both = [key for key in mine if key in theirs][:_COMPARED]
        same = [key for key in both if abs(mine[key] - theirs[key]) < AGREE]
        if any(each.by_text for each in self.named):
            return bool(both) and 2 * len(same) >= len(both)
        best = {next(iter(mine)), next(iter(theirs))}
        return len(same) == len(both) and best <= {*both}


class Asker:
    """Asks a server for single positions.

    Attributes:
        client: sends the requests.
        names: finds the ids of listed tokens.
        tokenizer: the triple's.
        first: the tokens of `FIRST`.
        open: those of `OPEN`.
        sharp: those of `SHARP`.
        exact: whether the server's tokenizer is the triple's.
    """

    def __init__(self, client: Client, names: TokenNames, tokenizer: Any) -> None:
        self.client = client
        self.names = names
        self.tokenizer = tokenizer
        self.exact = not client.settings.foreign_tokenizer
        self.first, self.open, self.sharp = (
            encoded(text, tokenizer) for text in (FIRST, OPEN, SHARP)
        )
        self._known: dict[str, Shown] = {}  # request -> what it lists

    def protocol(self, offer: Offer) -> Protocol:
        """The requests of an offer."""
        return Protocol(self.client, self.names, offer, self.tokenizer)

    def shown(self, offer: Offer, ids: Sequence[int]) -> Shown:
        """What one request for one position lists; no request is sent twice.

        Raises:
            Refused: the server lists no log-probabilities, or reads another prompt.
        """
        body = self.protocol(offer).body(ids)
        key = json.dumps([offer.endpoint, body])
        if key not in self._known:
            self._known[key] = self._ask(offer, body, len(ids))
        return self._known[key]

    def _ask(self, offer: Offer, body: dict[str, Any], length: int) -> Shown:
        def read(answer: Mapping[str, Any]) -> Shown:
            try:
                listed = generated(answer["choices"][0])
            except Malformed as error:
                raise Refused(f"it answers with {error}") from error
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise Refused("it answers without log-probabilities") from error
            counted = counted_by(answer)
            if self.exact and offer.endpoint == "completions" and counted not in (None, length):
                raise Refused(f"it reads {counted} tokens in a prompt of {length}")
            asked = offer.k if offer.asked is None else offer.asked
            values = values_of(listed, asked, self.names.vocab_size)
            return Shown(listed, values, counted, answer["choices"][0].get("text"))

        return self.client.ask(offer.endpoint, body, read, length, TRIES)

    def tried(self, offer: Offer, ids: Sequence[int]) -> Shown | None:
        """The same; None where the server refuses."""
        try:
            return self.shown(offer, ids)
        except Refused:
            return None
