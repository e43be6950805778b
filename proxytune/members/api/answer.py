"""A server's answer for one position: the log-probabilities of the tokens that it lists."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from proxytune.members.api.distribution import AGREE, FLOOR, Listed
from proxytune.members.api.names import Named, TokenNames

_SLACK = 1e-5  # probability that rounding to float32 may hide
_HEAD = struct.Struct("<iifff")


@dataclass(frozen=True)
class Answer:
    """The next token's log-probabilities, as far as the server lists them.

    Attributes:
        ids: the listed tokens, [listed].
        logprobs: their log-probabilities, natural logarithm, float32, [listed].
        bound: no other token has a greater log-probability; -inf if all tokens are listed.
        doubtful: tokens that share a listed name with other tokens.
        doubtful_bound: no doubtful token has a greater log-probability.
        unseen: the probability of all tokens outside `ids` together.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    bound: float
    doubtful: np.ndarray
    doubtful_bound: float
    unseen: float

    @property
    def known(self) -> dict[int, float]:
        """Token id -> log-probability, for the listed tokens."""
        return dict(zip(self.ids.tolist(), self.logprobs.tolist(), strict=True))

    def agrees(self, other: "Answer") -> bool:
        """Whether another answer for this position has the likeliest token's log-probability."""
        token = int(self.ids[self.logprobs.argmax()])
        theirs = other.known
        return token in theirs and abs(theirs[token] - float(self.logprobs.max())) < AGREE

    def logits(self, vocab_size: int) -> torch.Tensor:
        """The log-probabilities, [vocab]; minus infinity for tokens that are not listed."""
        row = torch.full((vocab_size,), -torch.inf)
        row[torch.from_numpy(self.ids)] = torch.from_numpy(self.logprobs)
        return row

    def ceiling(self, vocab_size: int) -> torch.Tensor:
        """The log-probabilities, [vocab]; upper bounds for tokens that are not listed."""
        row = torch.full((vocab_size,), self.bound)
        row[torch.from_numpy(self.doubtful)] = self.doubtful_bound
        row[torch.from_numpy(self.ids)] = torch.from_numpy(self.logprobs)
        return row

    def values(self, k: int, vocab_size: int) -> Listed:
        """The known values, for the arithmetic on them.

        Names that fit several tokens have none, so nothing is known about the rest.

        Args:
            k: tokens that were asked for.
            vocab_size: of the tokenizer.
        """
        known = np.sort(self.logprobs.astype(np.float64))[::-1]
        floors = int((known <= FLOOR).sum())
        lost = max(0, k - len(known))
        return Listed(known[~(known <= FLOOR)], floors, lost, k, vocab_size)

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        sizes = len(self.ids), len(self.doubtful)
        head = _HEAD.pack(*sizes, self.bound, self.doubtful_bound, self.unseen)
        ids = np.concatenate([self.ids, self.doubtful]).astype("<i4")
        return head + ids.tobytes() + self.logprobs.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Answer":
        """The answer that `to_bytes` wrote."""
        listed, doubtful, bound, doubtful_bound, unseen = _HEAD.unpack_from(data)
        ids = np.frombuffer(data, "<i4", listed + doubtful, _HEAD.size).astype(np.int64)
        logprobs = np.frombuffer(data, "<f4", listed, _HEAD.size + 4 * len(ids)).copy()
        return cls(ids[:listed], logprobs, bound, ids[listed:], doubtful_bound, unseen)


def alone(logprobs: Mapping[int, float]) -> Answer:
    """The answer for single tokens, which says nothing about the others.

    Args:
        logprobs: token id -> log-probability.
    """
    return Answer(
        ids=np.array(list(logprobs), dtype=np.int64),
        logprobs=np.array(list(logprobs.values()), dtype=np.float32),
        bound=0.0,
        doubtful=np.array([], dtype=np.int64),
        doubtful_bound=0.0,
        unseen=1.0,
    )


def values_of(listed: Sequence[Named], k: int, vocab_size: int) -> Listed:
    """The values of a list, for the arithmetic on them.

    Args:
        listed: as for `make_answer`.
        k: as for `make_answer`.
        vocab_size: of the tokenizer.
    """
    known, without, extra = _likeliest(listed, k)
    values = np.array([named.logprob for named in known], dtype=np.float64)
    floors = int((values <= FLOOR).sum())
    lost = len(without)
    if 0 < len(listed) < k and any(named.by_text for named in listed):
        lost += k - len(listed)  # tokens that share a text are one entry of the list
    beyond = sum(math.exp(min(0.0, n.logprob or 0.0)) for n in extra)
    return Listed(values[~(values <= FLOOR)], floors, lost, k, vocab_size, beyond)


def _likeliest(listed: Sequence[Named], k: int) -> tuple[list[Named], list[Named], list[Named]]:
    """The k likeliest tokens in descending order, those without a value, and the others.

    A nan comes first.
    """
    known = [named for named in listed if named.logprob is not None]
    known.sort(
        key=lambda n: math.inf if math.isnan(n.logprob or 0) else n.logprob or 0.0, reverse=True
    )
    without = [named for named in listed if named.logprob is None]
    return (known[:k], without, known[k:]) if k > 0 else (known, without, [])


def make_answer(listed: Sequence[Named], names: TokenNames, k: int) -> Answer:
    """Derives bounds for the tokens that a server did not list from those that it did.

    A token outside the k likeliest is no likelier than the last of them, and no likelier than the
    probability that the listed ones leave. If a name fits several tokens, or none, no token gets
    its log-probability; the probability that is left is the only bound for these tokens, as it is
    for those that are listed without a value (null). A value at the floor (-9999, -3.4e38) is that
    of an unlisted token.

    Args:
        listed: the listed tokens in any order; entries beyond the k likeliest (a server may add
            the chosen token) are dropped.
        names: finds the ids of a listed token.
        k: how many likeliest tokens the list has; -1 is the whole vocabulary.
    """
    ordered, without, _ = _likeliest(listed, k)
    known: dict[int, float] = {}
    doubtful: set[int] = set()
    unknown = False
    least = math.inf
    for named in ordered:
        assert named.logprob is not None
        if k > 0 and named.logprob <= FLOOR:
            continue
        least = named.logprob
        ids = names.ids(named)
        unknown |= not ids and named.id is None and not named.text.startswith("token_id:")
        if len(ids) == 1:
            # several tokens of a foreign tokenizer may write one word: add their probabilities
            with np.errstate(invalid="ignore"):  # a nan is refused by the arithmetic on the list
                known[ids[0]] = float(np.logaddexp(known.get(ids[0], -math.inf), named.logprob))
        else:
            doubtful.update(ids)
    for named in without:
        ids = names.ids(named)
        unknown |= not ids
        doubtful.update(ids)
    doubtful -= known.keys()
    seen = sum(map(math.exp, known.values()))
    left = math.log(max(0.0, 1 - seen) + _SLACK)
    if len(known) == names.vocab_size:
        bound = -math.inf
    elif unknown or least == math.inf:
        bound = left
    else:
        bound = min(left, least)
    order = sorted(known)
    return Answer(
        ids=np.array(order, dtype=np.int64),
        logprobs=np.array([known[token] for token in order], dtype=np.float32),
        bound=bound,
        doubtful=np.array(sorted(doubtful), dtype=np.int64),
        doubtful_bound=left,
        unseen=max(0.0, 1 - seen),
    )
