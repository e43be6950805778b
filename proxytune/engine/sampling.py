"""From logits to the next token: greedy or sampled, with penalties, filters and bans.

A token is sampled as the argmax of the log-probabilities plus Gumbel noise (the Gumbel-max trick).
The noise is a pure function of the sample's stream, the position and the token. So a sample has
the same text for any batch size, device, resume point or decoding strategy, and two models that
agree on the distribution agree on the token.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from proxytune.engine.penalties import History, Penalties
from proxytune.records import Decoding

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's constants (Steele, Lea, Flood 2014)
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_U64 = (1 << 64) - 1
NOTHING = -1  # the choice where no allowed token has a finite logit (an API lists only a few)
BROKEN = -2  # the choice where a logit is NaN or plus infinity; see `broken.blame`
# Fields of `Decoding` that a choice depends on, besides its lists of strings.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_CANDIDATES = 1024  # tokens sorted for top-p; the whole vocabulary only if these have too little


def sample_stream(seed: int, key: str, sample: int) -> int:
    """The random stream of one sample: 64 bits, a pure function of the three arguments.

    Args:
        seed: of the run.
        key: the prompt's name.
        sample: the sample's number.
    """
    name = f"{seed}\x1f{key}\x1f{sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def gumbel_noise(streams: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of stream and token.

    Args:
        streams: one per sample and position (`position_stream`), [rows], int64.
        token_ids: [rows, n] or [n], int64.

    Returns:
        [rows, n], float32.
    """
    state = streams.unsqueeze(-1) + (token_ids + 1) * _signed(_GOLDEN)
    # 52 random bits plus one half: the uniform number is never 0 or 1, and exact in float64.
    uniform = ((_mix(state) >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().float().log_().neg_()


def position_stream(stream: int, position: int) -> int:
    """The stream of one position, as a signed 64-bit integer.

    Args:
        stream: the sample's (`sample_stream`).
        position: the number of tokens generated before.
    """
    state = (stream + (position + 1) * _GOLDEN) & _U64
    state = ((state ^ (state >> 30)) * _MIX_1) & _U64
    state = ((state ^ (state >> 27)) * _MIX_2) & _U64
    return _signed(state ^ (state >> 31))


def _mix(state: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64: products wrap as those of unsigned integers do."""
    state = state ^ ((state >> 30) & ((1 << 34) - 1))
    state = state * _signed(_MIX_1)
    state = state ^ ((state >> 27) & ((1 << 37) - 1))
    state = state * _signed(_MIX_2)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    """An unsigned 64-bit integer as the signed one with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


class Sampler:
    """Chooses tokens as a `Decoding` says.

    First come the bias, the penalties, bans and choices, then temperature, top-k, top-p and min-p,
    in the order and with the meaning that `transformers` gives them: top-p keeps the smallest set
    of tokens whose probabilities sum to at least that much; of these, min-p drops those less
    likely than that share of the likeliest token.

    Args:
        decoding: the settings.
        banned: token ids that are never chosen.
        banned_first: token ids that are never chosen as a sample's first token.
        choices: the only token ids that may be chosen; empty for no such limit.
        bias: token id -> number that is added to its logit.

    Attributes:
        looks_back: whether a choice depends on the tokens before it; then `choose` and `certain`
            need histories.
    """

    def __init__(
        self,
        decoding: Decoding,
        banned: Sequence[int] = (),
        banned_first: Sequence[int] = (),
        choices: Sequence[int] = (),
        bias: Mapping[int, float] | None = None,
    ) -> None:
        self._given = {
            "decoding": {name: getattr(decoding, name) for name in _SAMPLING},
            "banned": [*banned],
            "banned_first": [*banned_first],
            "choices": [*choices],
            "bias": [[*pair] for pair in (bias or {}).items()],
        }
        self.temperature = decoding.temperature
        self.top_k = decoding.top_k
        self.top_p = decoding.top_p
        self.min_p = decoding.min_p
        self._penalties = Penalties(decoding)
        self.looks_back = not self._penalties.neutral
        self._lists = [
            torch.tensor(sorted(ids), dtype=torch.long) for ids in (banned, banned_first, choices)
        ]
        self._lists_on: dict[torch.device, list[torch.Tensor]] = {}
        self._biased = torch.tensor(list(bias or ()), dtype=torch.long)
        self._bias = torch.tensor(list((bias or {}).values()), dtype=torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON: `from_dict` makes a sampler of them that chooses the same."""
        return self._given

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> "Sampler":
        """A sampler in another process; see `to_dict`."""
        lists = {name: given[name] for name in ("banned", "banned_first", "choices")}
        return Sampler(Decoding(**given["decoding"]), **lists, bias=dict(given["bias"]))

    def choose(
        self,
        logits: torch.Tensor,
        streams: Sequence[int],
        positions: Sequence[int],
        histories: Sequence[History] = (),
    ) -> torch.Tensor:
        """The next token of each row.

        Args:
            logits: [rows, vocab], in any float type; they are not changed.
            streams: each row's `sample_stream`.
            positions: how many tokens each row has generated before.
            histories: the tokens before each row's next one; used where `looks_back`.

        Returns:
            Token ids, [rows]; `NOTHING` where every allowed token has a logit of minus infinity,
            and `BROKEN` where one has NaN or plus infinity.
        """
        scores = self._allowed(logits, positions, histories)
        if self.temperature == 0:
            return _best(scores)
        scores = scores.float() / self.temperature
        noise_streams = self._noise_streams(scores, streams, positions)
        if not self.top_k and self.top_p >= 1:
            return _best(self._with_noise(self._without_unlikely(scores), noise_streams))
        values, ids = self._candidates(scores)
        best = _best(values.add_(gumbel_noise(noise_streams, ids)))
        chosen = ids.gather(-1, best.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(best < 0, best, chosen)

    def certain(
        self,
        chosen: torch.Tensor,
        logits: torch.Tensor,
        ceiling: torch.Tensor,
        streams: Sequence[int],
        positions: Sequence[int],
        histories: Sequence[History] = (),
    ) -> torch.Tensor:
        """Whether `choose` would choose the same token if it knew all logits, [rows].

        It would if the choice wins even with every unknown logit at its upper bound. With top-k,
        top-p or min-p, the choice must win before these filters are applied, and no unknown logit
        may lie above it; then it passes the filters whatever the unknown logits are. A presence or
        frequency penalty moves a logit and its bound alike. True is proven; with False the choice
        may still be the same.

        Args:
            chosen: the result of `choose` for `logits`, [rows].
            logits: minus infinity where unknown, [rows, vocab].
            ceiling: the logits, with upper bounds where they are unknown, [rows, vocab].
            streams: as for `choose`.
            positions: as for `choose`.
            histories: as for `choose`.
        """
        known, scores, noisy = self._bounds(logits, ceiling, streams, positions, histories)
        certain = _best(noisy) == chosen
        highest_unknown = scores.masked_fill(known, -torch.inf).amax(-1)
        if self.temperature and self._filters:
            own = scores.gather(-1, chosen.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            certain &= highest_unknown <= own
        return certain | (highest_unknown == -torch.inf)

    def rivals(
        self,
        chosen: torch.Tensor,
        logits: torch.Tensor,
        ceiling: torch.Tensor,
        streams: Sequence[int],
        positions: Sequence[int],
        histories: Sequence[History] = (),
    ) -> torch.Tensor:
        """The unknown tokens because of which a choice is not `certain`.

        Args:
            chosen, logits, ceiling, streams, positions, histories: as for `certain`.

        Returns:
            How likely each may be to win, [rows, vocab]: its greatest score, noise included; minus
            infinity for known tokens, and for those that could not change the choice.
        """
        known, scores, noisy = self._bounds(logits, ceiling, streams, positions, histories)
        place = chosen.clamp(min=0).unsqueeze(-1)
        nothing = (chosen == NOTHING).unsqueeze(-1)
        could = (noisy >= noisy.gather(-1, place)) | nothing
        if self.temperature and self._filters:
            could |= scores > scores.gather(-1, place)
        return noisy.masked_fill(known | ~could, -torch.inf)

    def _bounds(
        self,
        logits: torch.Tensor,
        ceiling: torch.Tensor,
        streams: Sequence[int],
        positions: Sequence[int],
        histories: Sequence[History],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which logits are known, and the greatest scores that tokens may have, [rows, vocab] each.

        The scores come without noise and with it.
        """
        known = self._allowed(logits, positions, histories) > -torch.inf
        scores = self._allowed(ceiling, positions, histories)
        if not self.temperature:
            return known, scores, scores
        scores = scores.float() / self.temperature
        noise_streams = self._noise_streams(scores, streams, positions)
        return known, scores, self._with_noise(scores.clone(), noise_streams)

    @property
    def _filters(self) -> bool:
        """Whether top-k, top-p or min-p is in use."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def _noise_streams(
        self, scores: torch.Tensor, streams: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """Each row's `position_stream`, [rows], on the device of the scores."""
        pairs = zip(streams, positions, strict=True)
        noise_streams = torch.tensor([position_stream(s, p) for s, p in pairs])
        return noise_streams.to(scores.device, non_blocking=True)

    def _with_noise(self, scores: torch.Tensor, noise_streams: torch.Tensor) -> torch.Tensor:
        """Adds Gumbel noise to scores [rows, vocab], in place."""
        ids = torch.arange(scores.shape[-1], device=scores.device)
        return scores.add_(gumbel_noise(noise_streams, ids))

    def _allowed(
        self, logits: torch.Tensor, positions: Sequence[int], histories: Sequence[History]
    ) -> torch.Tensor:
        """The biased, penalised logits, and minus infinity for tokens that may not be chosen."""
        device = logits.device
        if len(self._biased):
            ids, bias = self._biased.to(device), self._bias.to(device)
            logits = logits.float().index_add(-1, ids, bias.expand(len(logits), -1))
        if self.looks_back:
            logits = self._penalties.apply(logits, histories)
        if device not in self._lists_on:
            self._lists_on[device] = [ids.to(device) for ids in self._lists]
        banned, banned_first, choices = self._lists_on[device]
        if len(choices):
            allowed = torch.full_like(logits, -torch.inf)
            logits = allowed.index_copy_(-1, choices, logits.index_select(-1, choices))
        elif len(banned) or len(banned_first):
            logits = logits.clone()
        if len(banned):
            logits.index_fill_(-1, banned, -torch.inf)
        first = [row for row, position in enumerate(positions) if position == 0]
        if len(banned_first) and first:
            logits[torch.tensor(first, device=device).unsqueeze(1), banned_first] = -torch.inf
        return logits

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that top-k, top-p and min-p leave, best first.

        Returns:
            Scores and token ids, [rows, n] each; the score of a token that top-p or min-p drops is
            minus infinity.
        """
        vocab = scores.shape[-1]
        kept = min(self.top_k or vocab, vocab)
        if self.top_p >= 1:
            values, ids = scores.topk(kept)
            return self._without_unlikely(values), ids
        count = min(kept, _CANDIDATES)
        values, ids = scores.topk(count)
        total = (values if count == kept else scores).logsumexp(-1, keepdim=True)
        before = _mass_before(values, total)
        if count < kept and bool((before[:, -1] < self.top_p).any()):
            values, ids = scores.topk(kept)
            before = _mass_before(values, values.logsumexp(-1, keepdim=True))
        beyond = before >= self.top_p
        beyond[:, 0] = False  # the best token always stays, even where top_p rounds to 0
        return self._without_unlikely(values.masked_fill(beyond, -torch.inf)), ids

    def _without_unlikely(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, n] with minus infinity for tokens that min-p drops."""
        if not self.min_p:
            return scores
        best = scores.amax(-1, keepdim=True)
        return scores.masked_fill(scores < best + math.log(self.min_p), -torch.inf)


def _best(scores: torch.Tensor) -> torch.Tensor:
    """The index of each row's greatest score, [rows]; else `NOTHING` or `BROKEN`."""
    best = scores.argmax(-1)  # of NaN, if there is one
    top = scores.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    best = torch.where(top == -torch.inf, NOTHING, best)
    return torch.where(top < torch.inf, best, BROKEN)


def _mass_before(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """For each score, the summed probability of all better ones, [rows, n].

    Args:
        values: scores, best first, [rows, n].
        total: their normaliser, a logsumexp, [rows, 1].
    """
    probs = (values - total).exp()
    return probs.cumsum(-1) - probs


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of each token id, decoded on its own."""
    return tokenizer.batch_decode([[i] for i in range(vocab_size)], skip_special_tokens=False)


def tokens_of(strings: Sequence[str], texts: Sequence[str]) -> set[int]:
    """The ids of tokens whose text is one of the strings, with or without spaces around it.

    A string that no single token writes has no id, although several tokens may write it.

    Args:
        strings: the strings.
        texts: the text of each token id (`token_texts`).
    """
    wanted = set(strings)
    return {i for i, text in enumerate(texts) if text in wanted or text.strip() in wanted}
