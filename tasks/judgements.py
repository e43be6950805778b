"""Judgements on disk: what a judge once said about a prompt is never asked again.

A judgement is stored as soon as it is made, under (judge, prompt), so a judge that fails in the
middle loses nothing and the same command goes on where it stopped.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from proxytune.files import ROOT

DEFAULT_CACHE = str(ROOT / "results" / "judgements.sqlite")
_LOCK_SECONDS = 60  # two runs may write to one file


class JudgeError(ValueError):
    """A judge could not judge: its service failed, or it speaks nonsense.

    It is a ValueError so that a command ends in one line; what was judged before is kept.
    """


def cached(
    path: str | None,
    judge: dict[str, Any],
    prompts: Sequence[str],
    judge_missing: Callable[[list[str]], Iterator[dict[str, Any]]],
) -> list[Any]:
    """The judgements of `prompts` in their order; only those not yet on disk are made.

    Args:
        path: the SQLite file; None keeps nothing.
        judge: everything that the judge's answer depends on besides the prompt (id, revision,
            settings); plain JSON values.
        prompts: equal ones are judged once.
        judge_missing: takes the prompts to judge and yields blocks, prompt -> judgement (a JSON
            value). A block is on disk before the next one is asked for.

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


def encodable(text: str) -> str:
    """Half a character, which neither a tokenizer nor HTTP takes, becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def identity_of(judge: Any) -> dict[str, Any]:
    """What a judge's verdicts depend on besides the texts; its class alone where it is a rule."""
    identity: Callable[[], dict[str, Any]] | None = getattr(judge, "identity", None)
    return {"rule": type(judge).__name__} if identity is None else identity()


def check_judge(judge: Any) -> None:
    """Lets a judge refuse (no key, no such model) before anything is generated."""
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
