"""Speculative decoding: how long the drafted blocks are.

A block of width w costs w cheap drafting steps and one pass of each other model over w tokens. It
gains between 1 and w tokens. The width changes the speed alone: every token is the one that
lockstep would choose. (This holds for sampled tokens, too: see `sampling`.)
"""

from collections.abc import Mapping, Sequence

MAX_WIDTH = 9
WARM_UP = 1  # first rounds of each batch size, whose times are not used
LOCKSTEP_ROUNDS = 3  # measured before the first drafted block
PROBE_WIDTH = 4  # the first width tried; on a CPU a pass over 2 or 3 tokens may take as long
FIRST_GAP, LAST_GAP = 32, 512  # rounds between two trials of a width that is not in use
MARGIN = 1.03  # a block must promise this many times the tokens per second of lockstep
MEMORY = 0.98  # weight of the acceptance so far, at each drafted token


class Pace:
    """Chooses the width of the next block: the one that promises the most tokens per second.

    If a drafted token is right with probability a, a block of width w gives 1 + a + ... + a^(w-1)
    tokens per row. Its time is measured; for a width that was never tried it is interpolated
    between measured widths. Both estimates follow the decoding. Where no block promises more than
    lockstep, lockstep stays, and a block is tried now and then, at growing intervals.

    Args:
        fixed: the number of drafted tokens in every block; None adapts.

    Attributes:
        drafted: tokens drafted so far.
        accepted: those of them that were right.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.drafted = 0
        self.accepted = 0
        self._tried = 2.0  # starts as if one of two drafted tokens had been right
        self._right = 1.0
        self._clocks: dict[int, _Clock] = {}

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is right; recent tokens weigh most."""
        return self._right / self._tried

    def width(self, rows: int) -> int:
        """Tokens per row in the next block, its first (certain) token included; 1 is lockstep."""
        if self.fixed is not None:
            return self.fixed + 1
        return self._clock(rows).next_width(self.acceptance)

    def ahead(self, rows: int) -> int:
        """How many tokens the small model guesses after new prompts; see `System.prefill`."""
        return 0

    def observe(self, rows: int, width: int, seconds: float, accepted: Sequence[int]) -> None:
        """Learns from a block.

        Args:
            rows: the number of rows.
            width: of the block.
            seconds: its time.
            accepted: how many drafted tokens of each row were right.
        """
        self.drafted += (width - 1) * rows
        self.accepted += sum(accepted)
        for right in accepted if width > 1 else ():
            for tried in range(right + (right < width - 1)):
                self._tried = self._tried * MEMORY + 1
                self._right = self._right * MEMORY + (tried < right)
        self._clock(rows).observe(width, seconds)

    def _clock(self, rows: int) -> "_Clock":
        # Batch sizes within a factor of two share their measurements.
        return self._clocks.setdefault(rows.bit_length(), _Clock())


def promised(acceptance: float, seconds: Mapping[int, float]) -> tuple[int, float]:
    """The width of block that promises the most tokens per second.

    Args:
        acceptance: the probability that a drafted token is right.
        seconds: width -> the time of a round; 1 is lockstep.

    Returns:
        The width, and how many times the tokens per second of lockstep it promises.
    """
    clock = _Clock(seconds)
    rates = [clock.rate(width, acceptance) for width in range(1, MAX_WIDTH + 1)]
    best = 1 + rates.index(max(rates))
    return (best, rates[best - 1] / rates[0]) if rates[best - 1] >= MARGIN * rates[0] else (1, 1.0)


class _Clock:
    """The measured time of a round at one batch size, for each width of block."""

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        self._rounds = 0
        self._seconds: dict[int, float] = dict(seconds or {})
        self._next_look = 0
        self._gap = FIRST_GAP

    def observe(self, width: int, seconds: float) -> None:
        """Notes the time of one round."""
        self._rounds += 1
        if self._rounds > WARM_UP:
            known = self._seconds.get(width, seconds)
            # A sudden stall (another process, the first use of a shape) must not count for much.
            self._seconds[width] = 0.8 * known + 0.2 * min(seconds, 2 * known)

    def next_width(self, acceptance: float) -> int:
        """The width with the best rate, or one that is due to be measured again."""
        if self._rounds < WARM_UP + LOCKSTEP_ROUNDS or 1 not in self._seconds:
            return 1
        if len(self._seconds) == 1:
            return PROBE_WIDTH
        rates = [self.rate(width, acceptance) for width in range(1, MAX_WIDTH + 1)]
        best = 1 + rates.index(max(rates))
        if max(rates) < MARGIN * rates[0]:
            best = 1
        if self._rounds < self._next_look:
            return best
        self._next_look = self._rounds + self._gap
        self._gap = FIRST_GAP if best > 1 else min(2 * self._gap, LAST_GAP)
        return 1 if best > 1 else PROBE_WIDTH

    def rate(self, width: int, acceptance: float) -> float:
        """Tokens per row and second that a width promises."""
        return sum(acceptance**i for i in range(width)) / self._time(width)

    def _time(self, width: int) -> float:
        """The time of a round in seconds: measured, or on the line through two measured widths."""
        if width in self._seconds:
            return self._seconds[width]
        known = sorted(self._seconds)
        above = next((i for i, w in enumerate(known) if w > width), len(known) - 1)
        left, right = known[above - 1], known[above]
        slope = max(0.0, (self._seconds[right] - self._seconds[left]) / (right - left))
        return self._seconds[left] + slope * (width - left)
