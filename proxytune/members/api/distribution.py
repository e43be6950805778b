"""Arithmetic on a server's lists: are they natural log-probabilities of the model's distribution?

Servers call many things a log-probability: logits, base-10 logarithms, probabilities, and the
logarithm of what sampling's temperature and filters left. A list of the k likeliest tokens of a
vocabulary of V shows the difference:

- A log-probability is at most 0, and the probabilities sum to at most 1. (Logits, base-10
  logarithms, a temperature above 1 without normalisation and added constants break this.)
- Each of the V - k tokens that are not listed is at most as likely as the last listed one, p_k; so
  they hold at most (V - k) p_k together. (Base-2 logarithms, a temperature below 1 without
  normalisation, and subtracted constants leave more than that.)
- Unlisted tokens of a softmax hold something. A list that sums to 1 though its last token is far
  from 0 was normalised after a filter. A real cliff at just this place is possible, so one list
  alone does not prove it, unless the server lists fewer tokens than it was asked for.
- The tokens after the likeliest do not all have one value.
"""

from dataclasses import dataclass

import numpy as np

from proxytune.errors import UpstreamError, UserError

FLOOR = -1000.0  # servers write -9999, -3.4e38 or -inf where they have no log-probability
EXACT = 5e-5  # a sum of probabilities this close to 1 "is 1": four decimals, or float32
TELLING = 4e-5  # if the last listed token has this probability, unlisted ones have some, too
AGREE = 0.25  # two requests for one log-probability may differ by this much (bfloat16)
POSITIVE = 1e-3  # above 0 by rounding
_ROUNDING = 2.0**-8  # relative error of a value in bfloat16
_MANY = 8  # so many equal values are no coincidence of rounding
_CLIFF = 5.0  # nats between neighbours: a constant after it fills up a list
_TAIL = 20  # all unlisted tokens together have more than this part of the last listed one
_STREAK = 3  # lists in a row that prove together what one alone does not
MEND = (
    "start vLLM with --logprobs-mode raw_logprobs, SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1, "
    "llama-server without post_sampling_probs; elsewhere turn off whatever changes "
    "log_softmax(logits): temperature, top-k, top-p, another logarithm"
)


class NotLogProbs(UpstreamError, UserError):
    """The server's lists are no natural log-probabilities of the model's own distribution."""


@dataclass(frozen=True)
class Listed:
    """The values that a server lists at one position.

    Attributes:
        values: the log-probabilities in descending order, without those below `FLOOR`.
        floors: how many values at or below `FLOOR` are listed.
        lost: how many of the tokens asked for have no value: their names coincide, or it is null.
        asked: how many tokens were asked for; -1 is the whole vocabulary.
        vocab_size: of the tokenizer; the model may have a few more.
        beyond: the probability of tokens that are listed beyond those asked for.
    """

    values: np.ndarray
    floors: int
    lost: int
    asked: int
    vocab_size: int
    beyond: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every token is listed."""
        return len(self.values) + self.floors >= self.vocab_size

    def fault(self) -> str | None:
        """The reason why no softmax gives these values; None if one may."""
        values = self.values
        if np.isnan(values).any() or np.isposinf(values).any():
            return f"a log-probability of {values[~np.isfinite(values)][0]}"
        if not len(values):
            return f"no log-probability above {FLOOR:g}"
        best = float(values[0])
        with np.errstate(over="ignore"):
            probs = np.exp(np.minimum(values, 50.0))
        total = float(probs.sum())
        if best > POSITIVE:
            if values[-1] >= 0 and abs(float(values.sum()) - 1) < 0.05:
                return f"probabilities (the first is {best:.4g}) in place of their logarithms"
            return f"a log-probability of {best:.4g}, above 0"
        if self._coarse(values):
            return "values that are rounded to two decimals or fewer"
        rounding = POSITIVE + _ROUNDING * float((probs * np.abs(values)).sum())
        if total > 1 + rounding:
            return f"probabilities that sum to {total:.4f}"
        return self._constant() or self._missing(total, rounding) or self._filtered(total)

    @staticmethod
    def _coarse(values: np.ndarray) -> bool:
        """Whether the values are multiples of 0.01, so that near ties cannot be told apart.

        Those of float16 and bfloat16 are multiples of 0.25 at most where they are.
        """
        telling = 100 * values[(values < -0.005) & (values > -8)]
        return len(telling) >= _MANY and bool(np.abs(telling - telling.round()).max() < 1e-4)

    def _constant(self) -> str | None:
        values, count = self.values, len(self.values)
        if count == 1 and self.floors and values[0] > -1e-6 and self.asked != 1:
            return "a probability of 1 for one token and none for the others"
        if count <= _MANY:
            return None
        if self.flat:
            return f"the same value ({values[-1]:.4g}) for every token but the likeliest"
        if self.whole:
            return None  # the rows of unused tokens are equal in some models
        gaps = values[:-1] - values[1:]
        fill = int(np.argmax(gaps)) + 1  # where the values after the widest gap begin
        if gaps[fill - 1] > _CLIFF and count - fill >= _MANY and values[fill] - values[-1] < 1e-6:
            return f"the same value ({values[-1]:.4g}) for the last {count - fill} tokens"
        return None

    def _missing(self, total: float, rounding: float) -> str | None:
        """More probability is missing than the unlisted tokens can hold."""
        if self.lost:
            return None  # the lost ones may hold it
        padded = 1.02 * self.vocab_size + 256  # the model's logits may be padded
        most = np.exp(float(self.values[-1]) * (1 - _ROUNDING))
        room = max(0.0, padded - len(self.values)) * most
        if 1 - total <= room + rounding:
            return None
        what = f"probabilities that sum to {total:.4f}"
        return what if self.whole else f"{what}, though unlisted tokens can hold {room:.4f} only"

    def _filtered(self, total: float) -> str | None:
        """Fewer tokens than asked for hold the whole probability."""
        short = self.floors > 0 or 0 < len(self.values) <= 0.8 * (self.asked - self.lost)
        if short and not self.whole and self.sums_to_one(total):
            return f"{len(self.values)} tokens that sum to exactly 1"
        return None

    def sums_to_one(self, total: float | None = None) -> bool:
        """Whether the listed tokens alone sum to 1 though others must have some probability."""
        if self.whole or not self.telling:
            return False
        total = float(np.exp(self.values).sum()) if total is None else total
        close = min(EXACT, np.exp(self.values[-1]) / _TAIL)
        return abs(total - 1) <= close or abs(total + self.beyond - 1) <= close

    @property
    def flat(self) -> bool:
        """Whether all tokens but the likeliest have one value."""
        return len(self.values) > 2 and float(self.values[1] - self.values[-1]) < 1e-6

    @property
    def telling(self) -> bool:
        """Whether the last listed token is likely enough to say something about the next one."""
        return bool(len(self.values)) and self.values[-1] >= np.log(TELLING)


class Watch:
    """Follows the lists of a run: what one list does not prove, several in a row do."""

    def __init__(self) -> None:
        self._summed = 0  # telling lists in a row that sum to 1
        self._same = 0  # equal lists in a row after different tokens
        self._last: tuple[int, bytes] | None = None

    def fault(self, listed: Listed, after: int, ids: np.ndarray) -> str | None:
        """The reason why this list is none of log-probabilities; None if nothing speaks for it.

        Args:
            listed: the list.
            after: the token that it follows.
            ids: the listed tokens.
        """
        found = listed.fault()
        if found is not None:
            return found
        many = max(len(listed.values), listed.asked) >= _MANY  # so a cliff there is no habit
        if listed.telling and many:
            self._summed = self._summed + 1 if listed.sums_to_one() else 0
            if self._summed >= _STREAK:
                return f"{len(listed.values)} tokens that sum to exactly 1 at every position"
        content = ids.tobytes() + listed.values.tobytes()
        last, self._last = self._last, (after, content)
        if last is not None and last[1] != content:
            self._same = 0
        elif last is not None and last[0] != after and len(listed.values) > 1:
            self._same += 1
            if self._same >= _STREAK - 1:
                return "the same values at different positions"
        return None
