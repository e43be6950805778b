"""Judgements on disk: a judge is never asked twice about the same prompt.

A judgement is stored as soon as it is made, under (judge, prompt). If a judge fails halfway, no
judgement is lost, and the same command continues where it stopped.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.files import ROOT

DEFAULT_CACHE = str(ROOT / "results" / "judgements.sqlite")
_LOCK_SECONDS = 60  # two runs may write to one file


class JudgeError(UserError):
    """A judge failed: its service did not answer, or its answers make no sense.

    It is a ValueError, so a command ends with one line; earlier judgements are kept.
    """


def cached(
    path: str | None,
    judge: dict[str, Any],
    prompts: Sequence[str],
    judge_missing: Callable[[list[str]], Iterator[dict[str, Any]]],
) -> list[Any]:
    """The judgements of `prompts`, in their order; only those that are not on disk are made.

    Args:
        path: the SQLite file; None stores nothing.
        judge: everything that the judge's answer depends on besides the prompt (id, revision,
            settings); plain JSON values.
        prompts: equal prompts are judged once.
        judge_missing: takes the prompts to judge and yields blocks of prompt -> judgement (a JSON
            value). Each block is stored before the next one is asked for.

    Raises:
        JudgeError: the judge failed, or the file cannot be read or written.
    """
    unique = list(dict.fromkeys(prompts))
    name = json.dumps(judge, sort_keys=True)
    try:
        with closing(_open(path)) as connection:
            found = {p: j for p in unique if (j := _read(connection, name, p)) is not None}
            missing = [p for p in unique if p not in found]
            if missing:
                for block in judge_missing(missing):
                    _write(connection, name, block)
                    found |= block
    except sqlite3.Error as error:
        raise JudgeError(
            f"the judgements in {path} cannot be read or written: {error}; move the "
            "file away to judge anew, or name another (cache=...)"
        ) from error
    return [found[prompt] for prompt in prompts]


def remember(path: str | None, about: dict[str, Any], value: Any) -> None:
    """Stores a fact about a judge beside its judgements; the newest one counts."""
    with closing(_open(path)) as connection:
        _write(connection, json.dumps(about, sort_keys=True), {"": value})


def remembered(path: str | None, about: dict[str, Any]) -> Any:
    """The fact that `remember` stored; None without one."""
    with closing(_open(path)) as connection:
        return _read(connection, json.dumps(about, sort_keys=True), "")


def encodable(text: str) -> str:
    """Replaces lone surrogates, which tokenizers and HTTP reject, by question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def identity_of(judge: Any) -> dict[str, Any]:
    """Everything that a judge's verdicts depend on besides the texts, as JSON.

    A judge without `identity()` is a rule; its class name says it all.
    """
    identity: Callable[[], dict[str, Any]] | None = getattr(judge, "identity", None)
    return {"rule": type(judge).__name__} if identity is None else identity()


def check_judge(judge: Any) -> None:
    """Calls the judge's `check()`, if it has one: it refuses a missing key or model.

    Raises:
        UserError: the judge cannot work.
    """
    check: Callable[[], None] | None = getattr(judge, "check", None)
    if check is not None:
        check()


def _open(path: str | None) -> sqlite3.Connection:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path or ":memory:", timeout=_LOCK_SECONDS)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS judgements"
        " (judge TEXT, prompt BLOB, judgement TEXT, PRIMARY KEY (judge, prompt))"
    )
    return connection


def _key(prompt: str) -> bytes:
    return prompt.encode("utf-8", errors="surrogatepass")  # a completion may hold half a character


def _read(connection: sqlite3.Connection, judge: str, prompt: str) -> Any:
    row = connection.execute(
        "SELECT judgement FROM judgements WHERE judge = ? AND prompt = ?", (judge, _key(prompt))
    ).fetchone()
    return None if row is None else json.loads(row[0])


def _write(connection: sqlite3.Connection, judge: str, block: dict[str, Any]) -> None:
    rows = [(judge, _key(p), json.dumps(judgement)) for p, judgement in block.items()]
    with connection:  # one transaction: the whole block or nothing
        connection.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?)", rows)
