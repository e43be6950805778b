"""Log-probabilities as the JSON of the endpoints that list them."""

from collections.abc import Sequence
from typing import Any

from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.text import TokenTexts
from proxytune.server.worker import Piece


class LogprobWriter:
    """Log-probabilities as the JSON of each endpoint.

    Args:
        texts: the text of each token.
        as_ids: names tokens "token_id:<int>" instead of by their text, which several may share.
    """

    def __init__(self, texts: TokenTexts, as_ids: bool) -> None:
        self.texts = texts
        self._as_ids = as_ids

    def name(self, token: int) -> str:
        """A token's name in lists of tokens."""
        return f"token_id:{token}" if self._as_ids else self.texts.text(token)

    def completion(
        self, ids: Sequence[int], rated: Sequence[TokenLogprob | None], top: int, offset: int
    ) -> dict[str, Any]:
        """`choice.logprobs` of a completion.

        Args:
            ids: the tokens.
            rated: their log-probabilities; None for a prompt's first token.
            top: tokens listed at each position besides the chosen one; -1 is all.
            offset: where the first token's text begins in the choice's text, in characters.
        """
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += len(self.texts.shown(token))
        return {
            "tokens": [self.name(token) for token in ids],
            "token_logprobs": [None if each is None else each.logprob for each in rated],
            "top_logprobs": [None if each is None else self._top(each, top) for each in rated],
            "text_offset": offsets,
        }

    def length(self, ids: Sequence[int]) -> int:
        """How many characters the tokens add to a completion."""
        return sum(len(self.texts.shown(token)) for token in ids)

    def chat(self, rated: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
        """`choice.logprobs` of a chat completion."""
        return {
            "content": [
                self._chat_token(each.id, each.logprob)
                | {"top_logprobs": [self._chat_token(*best) for best in _first(each, top)]}
                for each in rated
            ]
        }

    def prompt(self, rated: Sequence[TokenLogprob | None], top: int) -> list[Any]:
        """`choice.prompt_logprobs`: at each position token id -> log-probability, rank and text.

        The prompt's own token is always among them.
        """
        return [None if each is None else self._by_id(each, top) for each in rated]

    def members(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """`choice.member_logprobs` of tokens; nothing where the request asks for none."""
        rated = [
            {
                "token": self.texts.text(piece.id),
                "token_id": piece.id,
                "drafted": piece.drafted,
                "members": {role: self._member(each) for role, each in piece.members.items()},
            }
            for piece in pieces
            if piece.members is not None
        ]
        return {"member_logprobs": rated} if rated else {}

    def _member(self, rated: TokenLogprob) -> dict[str, Any]:
        top = [
            {"token": self.texts.text(token), "token_id": token, "logprob": logprob}
            for token, logprob in rated.top
        ]
        return {"logprob": rated.logprob, "rank": rated.rank, "top": top}

    def _by_id(self, rated: TokenLogprob, top: int) -> dict[str, Any]:
        entries = {rated.id: (rated.logprob, rated.rank)}
        for rank, (token, logprob) in enumerate(_first(rated, top), start=1):
            entries.setdefault(token, (logprob, rank))
        return {
            str(token): {
                "logprob": logprob,
                "rank": rank,
                "decoded_token": self.texts.text(token),
            }
            for token, (logprob, rank) in entries.items()
        }

    def _top(self, rated: TokenLogprob, top: int) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, logprob in [*_first(rated, top), (rated.id, rated.logprob)]:
            named.setdefault(self.name(token), logprob)  # of two of one name, the likelier
        return named

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": logprob, "bytes": self.texts.bytes(token)}


def _first(rated: TokenLogprob, top: int) -> list[tuple[int, float]]:
    return rated.top if top < 0 else rated.top[:top]
