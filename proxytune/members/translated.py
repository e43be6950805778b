"""A member of another vocabulary that speaks the base's ids (`Translation`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch

from proxytune.engine.system import Member, Pass


@dataclass
class Translation:
    """How the tokens of two vocabularies correspond.

    Attributes:
        read: a token of the base -> the member's tokens of the same bytes, at least one.
        source: for each id of the base the member's id of the same bytes, [vocab]; 0 where there is
            none, or where there are several.
        several: id of the base -> the member's ids of the same bytes, two or more.
        missing: the ids of the base that the member has no token for, ascending.
        lossy: whether one of the two has tokens that the other one lacks. If not, a pass gives the
            member's own logits; if so, log-probabilities over its own vocabulary.
        own_size: entries of the member's logits that are tokens.
        growth: the member's tokens per token of the base, by estimate.
    """

    read: Callable[[int], Sequence[int]]
    source: torch.Tensor
    several: Mapping[int, Sequence[int]]
    missing: Sequence[int]
    lossy: bool
    own_size: int
    growth: float = 1.0
    _tables: dict[torch.device, "_Tables"] = field(default_factory=dict)

    def logits(self, own: torch.Tensor) -> torch.Tensor:
        """The member's logits [..., own_size] as logits or log-probabilities of the base's ids."""
        if own.device not in self._tables:
            self._tables[own.device] = _Tables.of(self, own.device)
        tables = self._tables[own.device]
        out = own.index_select(-1, tables.source)
        if self.several:
            each = own[..., tables.several].masked_fill(tables.padding, -torch.inf)
            out[..., tables.targets] = each.float().logsumexp(-1).to(out.dtype)
        if self.lossy:
            out = out.float().sub_(own.float().logsumexp(-1, keepdim=True))
            out[..., tables.missing] = -torch.inf
        return out


@dataclass(frozen=True)
class _Tables:
    """The tensors of a `Translation` on one device; see there.

    Attributes:
        targets: the ids of the base with several tokens, [n].
        several: those tokens, padded with 0, [n, most].
        padding: where it is padded.
    """

    source: torch.Tensor
    targets: torch.Tensor
    several: torch.Tensor
    padding: torch.Tensor
    missing: torch.Tensor

    @staticmethod
    def of(translation: Translation, device: torch.device) -> "_Tables":
        lists = list(translation.several.values())
        most = max(map(len, lists), default=0)
        padded = [[*ids, *[-1] * (most - len(ids))] for ids in lists]
        several = torch.tensor(padded, dtype=torch.long, device=device)
        return _Tables(
            translation.source.to(device),
            torch.tensor(list(translation.several), dtype=torch.long, device=device),
            several.clamp(min=0),
            several < 0,
            torch.tensor(list(translation.missing), dtype=torch.long, device=device),
        )


class TranslatedMember(Member):
    """A member that reads the base's tokens as its own ones, and rates the base's tokens.

    A token of the base may be several of the member's, so its rows are longer than the base's. A
    prompt is in the member's own ids, each written as -1 - id (`own_ids`), for the member has a
    tokenizer of its own; what follows it is in the base's.

    Args:
        member: the model; it gives `Translation.own_size` logits.
        translation: between the base's vocabulary and the member's.
    """

    def __init__(self, member: Member, translation: Translation) -> None:
        self.member = member
        self.translation = translation
        self.vocab_size = len(translation.source)
        self.device = member.device
        self.max_positions = member.max_positions
        self.max_rows = member.max_rows
        self._counts: list[list[int]] = []  # per row: the member's tokens of each token read

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, in the base's."""
        return [len(counts) for counts in self._counts]

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> Pass:
        """Reads prompts, each into a new row; logits after each, [prompts, vocab]."""
        read = [[self._read(token) for token in prompt] for prompt in prompts]
        present = len(self._counts)
        logits = self.member.prefill([list(chain(*row)) for row in read]).logits
        self._counts += [list(map(len, row)) for row in read]
        return Pass(self.translation.logits(logits), full=self._full(self.member.lengths[present:]))

    def extend(self, tokens: torch.Tensor) -> Pass:
        """Reads a block of tokens [rows, width]; logits after each, [rows, width, vocab]."""
        read = [[self._read(token) for token in row] for row in tokens.tolist()]
        before = list(self.member.lengths)
        ends = [list(accumulate(map(len, row))) for row in read]
        most = max(row[-1] for row in ends)
        ids = [list(chain(*row)) for row in read]
        padded = torch.tensor([[*row, *[0] * (most - len(row))] for row in ids])
        logits = self.member.extend(padded).logits
        if most > tokens.shape[1]:
            places = torch.tensor(ends, device=logits.device) - 1
            rows = torch.arange(len(ids), device=logits.device).unsqueeze(1)
            logits = logits[rows, places]
            self.member.rollback([most - len(row) for row in ids])
        for counts, row in zip(self._counts, read, strict=True):
            counts += map(len, row)
        lengths = [[start + end for end in row] for start, row in zip(before, ends, strict=True)]
        return Pass(self.translation.logits(logits), full=self._full(lengths))

    def rollback(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[r] tokens of each row r."""
        forget = []
        for own, count in zip(self._counts, counts, strict=True):
            kept = len(own) - count
            forget.append(sum(own[kept:]))
            del own[kept:]
        self.member.rollback(forget)

    def keep(self, rows: list[int]) -> None:
        """Rearranges: new row i is the old row rows[i]; rows may be left out or repeated."""
        self._counts = [list(self._counts[row]) for row in rows]
        self.member.keep(rows)

    def clear(self) -> None:
        """Drops every row and frees their memory."""
        self._counts = []
        self.member.clear()

    def bytes_per_token(self) -> Mapping[torch.device, int]:
        """Memory that one more token of the base takes, in bytes by device, by estimate."""
        own = self.member.bytes_per_token()
        return {device: round(each * self.translation.growth) for device, each in own.items()}

    def _read(self, token: int) -> tuple[int, ...]:
        return (-1 - token,) if token < 0 else tuple(self.translation.read(token))

    def _full(self, lengths: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Whether the member's context ends before each place; None where it does nowhere.

        Args:
            lengths: the row's tokens up to that place, in the member's.
        """
        if self.max_positions is None:
            return None
        full = torch.tensor(lengths) > self.max_positions
        return full if bool(full.any()) else None


def own_ids(ids: Sequence[int]) -> list[int]:
    """Ids of a member's own vocabulary as its `TranslatedMember` reads them."""
    return [-1 - token for token in ids]
