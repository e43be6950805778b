"""The records of an experiment: prompts, examples, completions, scores, metrics.

All are plain data; they know no model, no task and no configuration.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, Unpack

from proxytune.errors import UserError

FinishReason = Literal["eos", "stop", "length", "nothing"]


@dataclass(frozen=True)
class Prompt:
    """One example's prompt, in the parts from which each member's text is rendered.

    Attributes:
        raw: the whole text, for a member without a chat template.
        user: the user's turn, for a member with a chat template.
        system: the system turn, for a member with a chat template; None for none.
        response_prefix: text that begins the assistant's turn ("Answer:").
        plain: makes every member read `raw`, chat models too (the paper's code benchmarks).
    """

    raw: str
    user: str
    system: str | None = None
    response_prefix: str = ""
    plain: bool = False


@dataclass(frozen=True)
class Example:
    """One dataset item: a prompt and the right answer.

    Attributes:
        id: unique in its task and stable between runs; resuming relies on it.
        prompt: the prompt that the members read.
        target: the gold value, in the task's own form.
        row: everything else that scoring needs (a test program, a group's name).
    """

    id: str
    prompt: Prompt
    target: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)


# Settings between two numbers: lowest, highest, neutral. Those of the presence and frequency
# penalty are OpenAI's. A repetition penalty has no customary bounds beyond 0; these keep float32
# logits finite.
_BOUNDS = {
    "min_p": (0.0, 1.0, 0.0),
    "repetition_penalty": (1e-3, 1e3, 1.0),
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
}


_LISTS = ("stop", "banned", "banned_first", "choices")  # settings of `Decoding` that are strings


@dataclass(frozen=True)
class Decoding:
    """How a task's completions are drawn; the defaults are the paper's.

    Attributes:
        max_new_tokens: upper limit on generated tokens per sample.
        temperature: 0 is greedy.
        top_p: nucleus mass, applied after the temperature.
        top_k: 0 keeps the whole vocabulary.
        min_p: after top-p, drops tokens less likely than this share of the likeliest one's
            probability; 0 drops none.
        n: samples per prompt.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens
            that stand in the base's prompt or in the completion so far; 1 changes nothing.
        presence_penalty: is subtracted from the logits of tokens in the completion so far.
        frequency_penalty: the same, times the number of times that the token stands there.
        ignore_eos: goes on after an end-of-sequence token, which is then a token like any other.
        stop: generation ends when one of these appears in the completion.
        banned: strings whose single tokens may never be chosen.
        banned_first: strings whose single tokens may not be chosen as the first token.
        choices: if given, only the single tokens of these strings may be chosen.
        think_budget: a thought that has so many tokens is ended; None for no such limit.
        think_least: while a thought has fewer tokens, `think_word` takes the place of its end
            (budget forcing, Muennighoff et al. 2025); None lets it end where it ends.
        think_word: one token.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    banned_first: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    think_budget: int | None = None
    think_least: int | None = None
    think_word: str = "Wait"

    def __post_init__(self) -> None:
        for name in ("think_budget", "think_least"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("n", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in ("temperature", "top_p", *_BOUNDS):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        for name, (low, high, neutral) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"{name} must be from {low:g} to {high:g} ({neutral:g} changes nothing), "
                    f"not {getattr(self, name)}"
                )
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        for name in _LISTS:
            strings = getattr(self, name)
            if isinstance(strings, str) or not all(isinstance(each, str) for each in strings):
                raise UserError(f"{name} must be strings in a list, not {strings!r}")
            if "" in strings:
                raise UserError(f"{name}: a string must not be empty")
        self._check_thought()

    def _check_thought(self) -> None:
        budget, least = self.think_budget, self.think_least
        if budget is not None and budget >= self.max_new_tokens:
            raise UserError(
                f"think_budget={budget} leaves no room for an answer in max_new_tokens="
                f"{self.max_new_tokens}; raise max_new_tokens"
            )
        if budget is not None and least is not None and least > budget:
            raise UserError(f"think_least={least} is more than think_budget={budget}")
        if not isinstance(self.think_word, str) or not self.think_word:
            raise UserError(f"think_word must be a word, not {self.think_word!r}")


class DecodingSettings(TypedDict, total=False):
    """The fields of `Decoding` as keywords; a list may be one string, and None is an empty one."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    n: int
    stop: str | Sequence[str] | None
    banned: str | Sequence[str] | None
    banned_first: str | Sequence[str] | None
    choices: str | Sequence[str] | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    ignore_eos: bool
    think_budget: int | None
    think_least: int | None
    think_word: str


def make_decoding(**settings: Unpack[DecodingSettings]) -> Decoding:
    """A `Decoding` from the keywords of `generate`; lists and single strings become tuples.

    Raises:
        UserError: an unknown setting, or an impossible value.
    """
    unknown = settings.keys() - Decoding.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"unknown setting {sorted(unknown)[0]!r}")
    arguments: dict[str, Any] = {"max_new_tokens": 256, **settings}
    for name in _LISTS:
        given = arguments.get(name)
        arguments[name] = (given,) if isinstance(given, str) else _strings(name, given)
    return Decoding(**arguments)


def _strings(name: str, given: Any) -> tuple[Any, ...]:
    if given is not None and not isinstance(given, Iterable):
        raise UserError(f"{name} must be a string or a list of them, not {given!r}")
    return tuple(given or ())


def whole_number(name: str, value: Any, least: int) -> int:
    """The value of a setting that counts something, as a Python integer.

    Args:
        name: of the setting, for the message.
        value: an integer of Python or of another library.
        least: the smallest number allowed.

    Raises:
        UserError: the value is of another type (a truth value, too), or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def finite(name: str, value: Any) -> float:
    """The value of a setting that measures something, as a Python float.

    Args:
        name: of the setting, for the message.
        value: a number of Python or of another library.

    Raises:
        UserError: the value is of another type (a truth value, too), infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return float(value)


@dataclass(frozen=True)
class Completion:
    """The text that one system wrote for one sample of one example.

    Attributes:
        example_id: the example's id.
        sample: 0 to n - 1.
        text: the decoded completion, cut before the first stop string.
        raw_text: the decoded completion as generated, nothing cut.
        token_ids: every generated token, the end-of-sequence token left out.
        finish_reason: "eos", "stop" (a stop string), "length", or "nothing" (a base behind an API
            listed no token that is allowed).
        prompt_sha256: role -> hash of the prompt text that this member read.
        extra: further records of the decoding, as in `Generation.extra`.
    """

    example_id: str
    sample: int
    text: str
    raw_text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_sha256: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The grading of one example.

    Attributes:
        example_id: the example's id.
        values: metric -> this example's value. Every metric is the mean of its values; None
            leaves the example out of that metric's denominator.
        answer: the answer extracted from the completion (of the first sample).
        target: the gold value that it was compared with, for people to read.
        parsed: False where no answer could be extracted.
        explanation: the reason, for people to read (an exception of the sandbox, a judge's words).
    """

    example_id: str
    values: dict[str, float | None]
    answer: str | None = None
    target: str | None = None
    parsed: bool = True
    explanation: str = ""


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown.

    Attributes:
        label: its name in a table.
        higher_is_better: False for a toxicity rate.
        percent: True when values lie in 0..1 and are shown times 100.
        hide_zeros: True for what seldom happens: people see no row that is 0 for every system.
    """

    label: str
    higher_is_better: bool = True
    percent: bool = True
    hide_zeros: bool = False


def is_plain(text: str) -> bool:
    """Whether a name can stand in a table: it steers no terminal, and no spreadsheet runs it."""
    steers = text.startswith(("=", "+", "-", "@")) and text != "-"  # a dash alone stands for none
    return text.isprintable() and not steers


@dataclass(frozen=True)
class Metric:
    """One number of one system on one task, with its uncertainty.

    Attributes:
        task, system, metric: names of what was measured.
        value: in the metric's own unit: a share in 0..1 unless the task says otherwise.
        n: examples in the denominator.
        n_examples: examples of the run.
        unparsed: examples without an extractable answer.
        stderr: standard error of `value`; None where it has none.
        ci_low, ci_high: 95 % interval; None where it has none.

    Raises:
        UserError: a name cannot stand in a table.
    """

    task: str
    system: str
    metric: str
    value: float
    n: int
    n_examples: int
    unparsed: int = 0
    stderr: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None

    def __post_init__(self) -> None:
        for name in (self.task, self.system, self.metric):
            if not is_plain(name):
                raise UserError(f"{name!r} is no name for a table")
