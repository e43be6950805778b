"""Requests for log-probabilities in the form that a server understands, and their answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxytune.engine.text import encoded
from proxytune.members.api.answer import Answer, make_answer, values_of
from proxytune.members.api.client import Client
from proxytune.members.api.distribution import FLOOR, MEND, POSITIVE, NotLogProbs, Watch
from proxytune.members.api.faults import Ended, Malformed, NoRoom, Refused
from proxytune.members.api.names import Named, TokenNames
from proxytune.members.api.reading import ENDED, counted_by, generated, named, number

# Ways to sample the token that nobody needs. Some servers list what sampling left: at temperature
# 0 a single token. At temperature 1, without filters, that is the model's own distribution.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 1, "top_p": 1},
    "unfiltered": {
        "temperature": 1,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    },
}
FIRST = "The capital of France is"  # a beginning that leaves much open, and does not end
_END_NEEDED = "use a server that lists end tokens, or one that rates prompts (echo)"


@dataclass(frozen=True)
class Offer:
    """The log-probabilities that a server gives.

    Attributes:
        endpoint: "completions", or "chat/completions" (which shows the first token only).
        k: tokens listed at each position; -1 is the whole vocabulary.
        blocks: how one request scores several positions: "prompt_logprobs" (vLLM's field) or
            "echo" (OpenAI's) for those of a prompt, "prompts" for a list of prompts that grow by
            one token; None if it scores one.
        token_ids: whether it names tokens by their ids on request.
        asked: the number of tokens in a request, if not k: servers that do not know -1 list the
            whole vocabulary when they are asked for its size.
        text: whether prompts go as text, because the server takes no token ids.
        counts: whether the server's count of a prompt's tokens was right.
        sampling: the way in `SAMPLING` that lists the model's own distribution.
        asks: whether it answers for single tokens that it does not list ("logprob_token_ids",
            vLLM's field).
        lacking: why it gives no more than that.
    """

    endpoint: str
    k: int
    blocks: str | None
    token_ids: bool
    asked: int | None = None
    text: bool = False
    counts: bool = False
    sampling: str = "greedy"
    asks: bool = False
    lacking: str = ""

    def __str__(self) -> str:
        listed = "every token" if self.k == -1 else f"the {self.k} likeliest tokens"
        places = f"many places ({self.blocks})" if self.blocks else "one place"
        how = ", asked with text" if self.text else ""
        how += "" if self.sampling == "greedy" else ", at temperature 1"
        how += ", and further tokens by their ids" if self.asks else ""
        return f"{listed}, of {places} per request to {self.endpoint}{how}"


@dataclass
class Protocol:
    """Asks for log-probabilities.

    Attributes:
        client: sends the requests.
        names: finds the ids of listed tokens.
        offer: the log-probabilities that the server gives.
        tokenizer: writes prompts for servers that want text.
    """

    client: Client
    names: TokenNames
    offer: Offer
    tokenizer: Any
    _watch: Watch = field(default_factory=Watch)
    _rates: bool = False  # prompts as single requests do: known after `_past_end`

    def ask(self, ids: Sequence[int], start: int) -> list[Answer]:
        """The answers after ids[: start + 1], ids[: start + 2], ..., `ids`, by one request.

        Some servers list nothing where their text ends. These are asked once more (`_past_end`).

        Raises:
            NotLogProbs: the server has changed what it lists.
            ValueError, OSError: see `Client.ask`.
        """
        try:
            return self._ask(ids, start)
        except Ended:
            if self.offer.endpoint != "completions":
                raise
            return self._past_end(ids, start)

    def _past_end(self, ids: Sequence[int], start: int) -> list[Answer]:
        """The answers up to `ids` by a longer prompt that is rated: there no text ends.

        Raises:
            Refused: the server rates no prompts, or not as it answers single requests.
            ValueError, OSError: see `Client.ask`.
        """
        try:
            if not self._rates:
                known = encoded(FIRST, self.tokenizer)
                (rated,) = self._echo(known, len(known) - 1)
                (single,) = self._ask(known, len(known) - 1)
                self._rates = single.agrees(rated)
            if self._rates:
                return self._echo(ids, start)
        except NoRoom:
            raise
        except Refused as error:
            raise Refused(f"{ENDED}, and rates no prompts ({error}): {_END_NEEDED}") from error
        raise Refused(f"{ENDED}, and rates prompts otherwise: {_END_NEEDED}")

    def _echo(self, ids: Sequence[int], start: int) -> list[Answer]:
        """The answers after ids[: start + 1], ..., `ids` by a longer prompt that is rated."""
        longer = self._longer(ids)
        rating = replace(self, offer=replace(self.offer, blocks="echo"))

        def read(answer: Mapping[str, Any]) -> list[Answer]:
            lists = rating.echoed(answer, longer)[start + 1 : len(longer)]
            pairs = zip(lists, ids[start:], strict=True)
            return [self.checked(named(listed), token) for listed, token in pairs]

        body = rating.body(longer, start)
        return self.client.ask(self.offer.endpoint, body, read, len(longer), tries=2)

    def _longer(self, ids: Sequence[int]) -> list[int]:
        """These tokens and one more, so that the server can be asked for them.

        Raises:
            Refused: the server takes text, and there is none for them.
        """
        words = [encoded(text, self.tokenizer)[-1] for text in (" a", ".", "\n")]
        longer = [[*ids, token] for token in (ids[-1], *words)]
        if not self.offer.text:
            return longer[0]
        found = next((each for each in longer if text_of(each, self.tokenizer) is not None), None)
        if found is None:
            raise Refused("no longer prompt has a text of its own")
        return found

    def _ask(self, ids: Sequence[int], start: int) -> list[Answer]:
        """See `ask`.

        Raises:
            Ended: the server lists nothing where its text ends.
        """
        block = start < len(ids) - 1
        assert not block or self.offer.blocks is not None
        body = self.body(ids, start)

        def read(answer: Mapping[str, Any]) -> list[Answer]:
            lists = self.lists(answer, ids, start)
            self._recount(answer, ids, block)
            return [
                self.checked(each, ids[place])
                for place, each in enumerate(lists, start=len(ids) - len(lists))
            ]

        prompts = body.get("prompt", [])
        many = block and self.offer.blocks == "prompts"
        read_tokens = sum(range(start + 1, len(ids) + 1)) if many else len(ids)
        assert not many or len(prompts) == len(ids) - start
        return self.client.ask(self.offer.endpoint, body, read, read_tokens)

    def ask_for(
        self, ids: Sequence[int], tokens: Sequence[int], tries: int | None = None
    ) -> dict[int, float]:
        """The log-probabilities of single tokens after `ids`: token id -> log-probability.

        Tokens for which the server has no number (`FLOOR`) are missing.

        Raises:
            NotLogProbs: these can be none.
            Refused: it does not answer for each of them by its id.
            ValueError, OSError: see `Client.ask`.
        """
        body = self.body(ids) | {"logprobs": 1, "logprob_token_ids": list(map(int, tokens))}

        def read(answer: Mapping[str, Any]) -> dict[int, float]:
            named = {self.names.exact(each): each for each in generated(answer["choices"][0])}
            lacking = [token for token in tokens if token not in named]
            if lacking:
                raise Refused(f"{self.client.settings.base_url} does not answer for {lacking[:5]}")
            values = [named[token].logprob for token in tokens]
            found = {t: v for t, v in zip(tokens, values, strict=True) if v is not None}
            wrong = [v for v in found.values() if not v <= POSITIVE]
            if wrong or sum(map(math.exp, found.values())) > 1 + POSITIVE:
                what = f"a log-probability of {wrong[0]:.4g}" if wrong else "a sum above 1"
                raise NotLogProbs(complaint(self.client, f"{what} for tokens by their ids"))
            return {token: value for token, value in found.items() if value > FLOOR}

        return self.client.ask(self.offer.endpoint, body, read, len(ids), tries)

    def body(self, ids: Sequence[int], start: int | None = None) -> dict[str, Any]:
        """The request for the positions after `ids`, and after those from ids[: start + 1] on."""
        offer, model = self.offer, self.client.settings.model
        body: dict[str, Any] = {"model": model, "max_tokens": 1, **SAMPLING[offer.sampling]}
        count = offer.k if offer.asked is None else offer.asked
        if offer.endpoint == "chat/completions":
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            body["messages"] = [{"role": "user", "content": text}]
            return body | {"logprobs": True, "top_logprobs": count}
        body["logprobs"] = count
        if offer.token_ids:
            body["return_tokens_as_token_ids"] = True
        block = offer.blocks if start is not None and start < len(ids) - 1 else None
        if block == "prompts":
            assert start is not None
            body["prompt"] = [self.prompt(ids[: i + 1]) for i in range(start, len(ids))]
            return body
        body["prompt"] = self.prompt(ids)
        if block == "echo":
            body["echo"] = True
        elif block is not None:
            body["prompt_logprobs"] = count
        return body

    def prompt(self, ids: Sequence[int]) -> list[int] | str:
        """A prompt as the server takes it.

        Raises:
            Refused: it takes text alone, and there is no text for these tokens.
        """
        if self.client.settings.foreign_tokenizer:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        if not self.offer.text:
            return list(map(int, ids))
        text = text_of(ids, self.tokenizer)
        if text is None:
            tail = self.tokenizer.decode(ids[-8:])
            raise Refused(
                f"{self.client.settings.base_url} takes text alone, and no text encodes to these "
                f"{len(ids)} tokens (they end in {tail!r}): use a server that takes token ids"
            )
        return text

    def lists(self, answer: Mapping[str, Any], ids: Sequence[int], start: int) -> list[list[Named]]:
        """The listed tokens after ids[: start + 1], ids[: start + 2], ..., `ids`."""
        choices = answer["choices"]
        if start == len(ids) - 1:
            return [generated(choices[0])]
        if self.offer.blocks == "prompts":
            if sorted(choice["index"] for choice in choices) != list(range(len(ids) - start)):
                raise Malformed(f"{len(choices)} choices for {len(ids) - start} prompts")
            return [generated(c) for c in sorted(choices, key=lambda c: c["index"])]
        if self.offer.blocks == "echo":
            lists = self.echoed(answer, ids)
            if len(lists) == len(ids):
                raise Ended(ENDED)
            return [named(listed) for listed in lists[start + 1 :]]
        return [*self._rated(choices[0], ids, start + 1), generated(choices[0])]

    def echoed(self, answer: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
        """What is listed for each token of a prompt that is given back, and for the next one.

        The first tokens may lack their lists: those that the tokenizer adds before a text, which
        llama-cpp-python leaves out. There is no next token where the server's text has ended.
        """
        lists = answer["choices"][0]["logprobs"]["top_logprobs"]
        usage = answer.get("usage")
        written = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        whole = len(ids) + (written != 0)
        if not 0 <= whole - len(lists) <= lead(ids, self.tokenizer):
            raise Malformed(f"{len(lists)} places rated for a prompt of {len(ids)} tokens")
        return [None] * (whole - len(lists)) + lists

    def _rated(self, choice: Mapping[str, Any], ids: Sequence[int], first: int) -> list[Any]:
        """The listed tokens at the positions `first`, `first` + 1, ... of the prompt."""
        lists = choice["prompt_logprobs"]
        if len(lists) != len(ids) or any(
            str(token) not in rated for token, rated in zip(ids[1:], lists[1:], strict=True)
        ):
            raise Malformed("the prompt that was rated is not the one that was sent")
        return [
            [Named(number(each), id=int(i)) for i, each in listed.items()]
            for listed in lists[first:]
        ]

    def checked(self, listed: Sequence[Named], after: int) -> Answer:
        """The answer for one position, if its values can be log-probabilities.

        Args:
            listed: the position's tokens.
            after: the token before it.

        Raises:
            NotLogProbs: they cannot.
        """
        answer = make_answer(listed, self.names, self.offer.k)
        values = values_of(listed, self.offer.k, self.names.vocab_size)
        found = self._watch.fault(values, after, answer.ids)
        if found is None and self.offer.k == -1 and len(answer.ids) < self.names.vocab_size:
            found = f"{len(answer.ids)} of {self.names.vocab_size} tokens"
        if found is not None:
            raise NotLogProbs(
                f"{complaint(self.client, found)}; it did otherwise before: what is finished is "
                "kept, and the same command goes on"
            )
        return answer

    def _recount(self, answer: Mapping[str, Any], ids: Sequence[int], block: bool) -> None:
        """Refuses an answer to a prompt that the server reads as another number of tokens."""
        counted = counted_by(answer)
        many = block and self.offer.blocks == "prompts"
        if not self.offer.counts or many or counted in (None, len(ids)):
            return
        why = "it cuts prompts, or adds to them: give it a larger context"
        if self.offer.text:
            end = self.tokenizer.decode(ids[-8:])
            why = f"({end!r} at its end): it cuts texts, or its tokenizer is another one"
        raise Refused(
            f"{self.client.settings.base_url} reads {counted} tokens in a prompt of {len(ids)}: "
            f"{why}; what is finished is kept"
        )


def text_of(ids: Sequence[int], tokenizer: Any) -> str | None:
    """The text that encodes to these tokens, with the special tokens that the tokenizer adds."""
    ids = list(map(int, ids))
    added = lead(ids, tokenizer)
    text = tokenizer.decode(ids[added:], clean_up_tokenization_spaces=False)
    return text if encoded(text, tokenizer) == ids else None


def lead(ids: Sequence[int], tokenizer: Any) -> int:
    """How many of these tokens are those that the tokenizer adds before a text."""
    added = encoded("", tokenizer)
    return len(added) if list(ids[: len(added)]) == added else 0


def complaint(client: Client, found: str) -> str:
    """A server's fault (`Listed.fault`) with the way out, in one line."""
    return (
        f"{client.settings.base_url} lists {found}: these are no natural log-probabilities of the "
        f"model's own distribution ({MEND})"
    )
