"""Answers and spending in one SQLite file: no answer is paid for twice."""

import copy
import errno
import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.members.api.answer import Answer

_KEPT_IN_MEMORY = 4096  # answers, if there is no file


class Store:
    """Position -> answer, and named facts.

    A position's key is the model's name, the number of listed tokens, and all token ids before
    it, so one answer serves every system, every sample and blocks of any width. Threads may share
    a store, and processes may share its file.

    Args:
        path: the file; None keeps the latest answers in memory.
        model: names the model and the settings that its answers depend on; part of every key.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self._model = model.encode()
        self._keep = None if path else _KEPT_IN_MEMORY
        self._lock = threading.Lock()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=60)
        self._path = path
        with self._changing():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB)"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")

    def rename(self, model: str) -> None:
        """Gives answers other keys from now on; see `model` above. Facts stay."""
        self._model = model.encode()

    def beside(self, name: str) -> "Store":
        """A store of further answers for the same positions, in the same file."""
        other = copy.copy(self)
        other._model = self._model + b"\0" + name.encode()
        return other

    def get(self, ids: Sequence[int], start: int) -> list[Answer | None]:
        """The answers after ids[: start + 1], ids[: start + 2], ..., `ids`; None if missing."""
        found: list[Answer | None] = []
        with self._lock:
            for key in self._keys(ids, start):
                row = self._db.execute("SELECT value FROM answers WHERE key = ?", [key]).fetchone()
                found.append(None if row is None else Answer.from_bytes(row[0]))
        return found

    def put(self, ids: Sequence[int], start: int, answers: Sequence[Answer]) -> None:
        """Keeps the answers after ids[: start + 1], ids[: start + 2], ..., `ids`."""
        rows = [
            (key, answer.to_bytes())
            for key, answer in zip(self._keys(ids, start), answers, strict=True)
        ]
        with self._changing():
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            if self._keep:
                newest = "(SELECT max(rowid) FROM answers)"
                self._db.execute(f"DELETE FROM answers WHERE rowid <= {newest} - ?", [self._keep])

    def fact(self, name: str) -> Any:
        """The fact of this name; None if there is none."""
        with self._lock:
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return None if row is None else json.loads(row[0])

    def note(self, name: str, value: Any) -> None:
        """Keeps a fact under a name: any value that JSON can hold."""
        with self._changing():
            self._db.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, json.dumps(value)]
            )

    def add(self, name: str, amounts: Mapping[str, float]) -> dict[str, float]:
        """Adds amounts to the numbers in a fact; returns the sums."""
        with self._changing():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
            sums: dict[str, float] = {} if row is None else json.loads(row[0])
            sums = {key: sums.get(key, 0) + amounts.get(key, 0) for key in {**sums, **amounts}}
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, json.dumps(sums)])
        return sums

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    def _keys(self, ids: Sequence[int], start: int) -> list[bytes]:
        data = np.asarray(ids, dtype="<i4").tobytes()
        running = hashlib.sha256(self._model + b"\0" + data[: 4 * start])
        keys = []
        for position in range(start, len(ids)):
            running.update(data[4 * position : 4 * position + 4])
            keys.append(running.digest())
        return keys

    @contextmanager
    def _changing(self) -> Any:
        try:
            with self._lock, self._db:
                yield
        except sqlite3.DatabaseError as error:
            full = "full" in str(error)
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, str(error), str(self._path)) from error
