"""What a caller gets of each sample: `Generation`."""

from dataclasses import dataclass, field
from typing import Any

from proxytune.engine.rows import Finished
from proxytune.records import FinishReason


@dataclass(frozen=True)
class Generation:
    """One sample of one prompt.

    Attributes:
        prompt_index: the prompt's place in the list given to `generate`.
        sample: 0 to n - 1.
        text: the completion, cut before the first stop string.
        raw_text: the completion as generated.
        token_ids: the generated tokens, the end-of-sequence token left out.
        finish_reason: "eos", "stop" (a stop string), "length", or "nothing" (a base behind an API
            listed no token that is allowed).
        extra: "trace", where `generate` was asked to record: one entry per generated token,
            {"id", "p": {role: probability}, "top": {role: [[id, probability], ...]}}. The
            probabilities are those before temperature and filters; the role "system" is the whole
            system. The end-of-sequence token has an entry, too. "api", where a base behind an API
            lists only some tokens: see `truncation.TruncationRecord`. "touched", with a formula
            that gates: how many tokens were not chosen from the base's own logits. "unshifted",
            where members have other vocabularies than the base: role -> the mean probability that
            this member gave to tokens that the base lacks; "base" -> the base's of tokens without
            a shift. "agreed", where `generate` was asked to compare: how many tokens each member
            alone would have chosen, with the same noise, and their number, under "system"; the
            end-of-sequence token counts. "thought", where a member thinks: {"tokens": its length,
            the tag included, "end": "own", "budget", "none" (no thought was written) or None (it
            was never ended)}.
    """

    prompt_index: int
    sample: int
    text: str
    raw_text: str
    token_ids: list[int]
    finish_reason: FinishReason
    extra: dict[str, Any] = field(default_factory=dict)


def generation_of(finished: Finished) -> Generation:
    """The sample of a row that has ended."""
    shares = finished.unshifted
    extra = {
        "trace": finished.trace,
        "api": finished.truncation and finished.truncation.to_dict(),
        "touched": finished.touched,
        "unshifted": shares and {role: round(share, 6) for role, share in shares.items()},
        "agreed": finished.agreed,
        "thought": finished.thought,
    }
    return Generation(
        prompt_index=finished.index,
        sample=finished.sample,
        text=finished.text,
        raw_text=finished.raw_text,
        token_ids=finished.token_ids,
        finish_reason=finished.finish_reason,
        extra={name: value for name, value in extra.items() if value is not None},
    )
