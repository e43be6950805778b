"""The records that flow through an experiment, and their JSON Lines files.

Everything here is plain data: it knows no model, no task and no configuration.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

FinishReason = Literal["eos", "stop", "length", "nothing"]

JsonlRecord = TypeVar("JsonlRecord")


@dataclass(frozen=True)
class Prompt:
    """One example's prompt in the parts from which each role's bytes are made.

    Attributes:
        raw: the whole text that a member without a chat template reads.
        user: the user's turn for a member with a chat template.
        system: the system turn for a member with a chat template; None for none.
        response_prefix: text that begins the assistant's turn ("Answer:").
        plain: every member reads `raw`, chat models too (the paper's code benchmarks).
    """

    raw: str
    user: str
    system: str | None = None
    response_prefix: str = ""
    plain: bool = False


@dataclass(frozen=True)
class Example:
    """One dataset item: how to ask it, and what a right answer is.

    Attributes:
        id: unique in its task and stable between runs; resuming relies on it.
        prompt: what the members are asked.
        target: the gold value, in the task's own form.
        row: whatever else scoring needs (a test program, a group's name).
    """

    id: str
    prompt: Prompt
    target: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How a task wants its completions drawn (the paper's setting, by default).

    Attributes:
        max_new_tokens: upper limit on generated tokens per sample.
        temperature: 0 is greedy.
        top_p: nucleus mass, applied after the temperature.
        top_k: 0 keeps the whole vocabulary.
        n: samples per prompt.
        stop: generation ends when one of these appears in the completion.
        banned: strings whose single tokens may never be chosen.
        banned_first: strings whose single tokens may not be chosen at the first step.
        choices: when given, only the tokens of these strings may be chosen.
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

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("n", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        for name in ("stop", "banned", "banned_first", "choices"):
            strings = getattr(self, name)
            if isinstance(strings, str) or not all(isinstance(each, str) for each in strings):
                raise ValueError(f"{name} must be strings in a list, not {strings!r}")
            if "" in strings:
                raise ValueError(f"{name}: a string must not be empty")


def whole_number(name: str, value: Any, least: int) -> int:
    """The value of a setting that counts something: Python's integer or another library's.

    Raises:
        ValueError: another type (truth values, too), or a number below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def finite(name: str, value: Any) -> float:
    """The value of a setting that measures something.

    Raises:
        ValueError: another type (truth values, too), an infinity, or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


@dataclass(frozen=True)
class Completion:
    """What one system wrote for one sample of one example.

    Attributes:
        example_id: the example's id.
        sample: 0 to n-1.
        text: the decoded completion, cut before the first stop string.
        raw_text: the decoded completion as generated, nothing cut.
        token_ids: every generated token, the end-of-sequence token left out.
        finish_reason: "eos", "stop" (a stop string), "length", or "nothing" (no token that was
            allowed was within reach: a base behind an API lists a few only).
        prompt_sha256: role -> hash of the prompt text that the role read.
        extra: what a strategy wants recorded (truncated log-probs of an API base, say).
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
    """How one example went.

    Attributes:
        example_id: the example's id.
        values: metric -> this example's value. Every metric is the mean of its values; None
            leaves the example out of that metric's denominator.
        answer: what was extracted from the completion (of the first sample).
        target: the gold value that it was compared with, for people to read.
        parsed: False where no answer could be extracted.
        explanation: why, for people to read (an exception of the sandbox, a judge's words).
    """

    example_id: str
    values: dict[str, float | None]
    answer: str | None = None
    target: str | None = None
    parsed: bool = True
    explanation: str = ""


@dataclass(frozen=True)
class Metric:
    """One number of one system on one task, with its uncertainty.

    Attributes:
        task, system, metric: where it belongs.
        value: in the metric's own unit: a share in 0..1 unless the task says otherwise.
        n: examples in the denominator.
        n_examples: examples of the run.
        unparsed: examples without an extractable answer.
        stderr: standard error of `value`; None where it has none.
        ci_low, ci_high: 95 % interval; None where it has none.
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


def read_jsonl(path: Path, record: type[JsonlRecord]) -> Iterator[JsonlRecord]:
    """Yields the records of a JSON Lines file; a line cut short by a crash ends it.

    Args:
        path: the file; a missing one holds no records.
        record: the dataclass of a line; fields that it does not know are an error.

    Raises:
        ValueError: a line before the last is not JSON, or does not fit the record.
    """
    if not path.exists():
        return
    known = {f.name for f in fields(record)}  # pyright: ignore[reportArgumentType]
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the writer was killed inside this line
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not row.keys() <= known:
                raise ValueError(f"{path}:{number} is not a {record.__name__} record")
            yield record(**row)


class JsonlWriter:
    """Appends records (dataclasses) to a JSON Lines file, each on disk before the next.

    A half line left by a killed writer is cut off first, so that a file never holds a broken line
    in its middle. Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab+", buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        kept = _end_of_last_line(self._file, end)
        if kept < end:
            self._file.truncate(kept)

    def write(self, record: Any) -> None:
        """Appends one record; it survives a killed process, though not a power cut.

        Raises:
            OSError: the disk is full; the half line is removed first.
        """
        line = _dump(record)
        start = self._file.seek(0, os.SEEK_END)
        try:
            # a raw file may write less than it is given when the disk is nearly full
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            self._file.truncate(start)
            error.filename = str(self.path)
            raise

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Replaces a JSON Lines file as a whole: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(_dump(record) for record in records))


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a crash leaves the old file or the new one, never half of one.

    Raises:
        OSError: it cannot be written (the disk is full, say); the old file stays, and no other.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def _dump(record: Any) -> bytes:
    text = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="surrogatepass")


def _end_of_last_line(file: Any, end: int) -> int:
    """The offset just behind the last newline before `end`."""
    block = 1 << 16
    position = end
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
