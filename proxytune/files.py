"""Files: their names, JSON Lines that are appended to, and whole-file replacement."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from proxytune.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
IN_CHECKOUT = (_PACKAGE.parent / "setup.py").is_file()  # else installed from a wheel
ROOT = _PACKAGE.parent if IN_CHECKOUT else Path.cwd()  # of results/ and pocket/

LONGEST_NAME = 255  # bytes of a file's name, on the file systems in use

JsonlRecord = TypeVar("JsonlRecord")


def shipped(name: str) -> Path:
    """A folder of the checkout that also travels in the wheel (setup.py).

    Args:
        name: from the root of the checkout: "conf", "results/paper".
    """
    return ROOT / name if IN_CHECKOUT else _PACKAGE / "shipped" / name


def check_name(what: str, name: str) -> str:
    """A name that becomes a folder, as it is.

    Args:
        what: the setting, for the message.
        name: its value.

    Raises:
        UserError: it is no name of one folder ("../x", "a/b", "", a name of 256 bytes).
    """
    if name in ("", ".", "..") or name.startswith("~") or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise UserError(
            f"{what}={name!r} becomes a folder: it takes a plain name, without / and \\; the "
            "place of the results is output_dir=..."
        )
    if len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        raise UserError(f"{what}={name[:40]}... is too long for a folder: at most 255 bytes")
    return name


def folder_name(text: str) -> str:
    """A folder's name for any text; different texts have different names.

    Separators are escaped as in URLs, and a text that is too long ends in a hash of the whole.
    """
    name = re.sub(r"[%/\\\x00-\x1f\x7f]|^[.~]", lambda found: f"%{ord(found[0]):02X}", text)
    if len(name.encode(errors="surrogatepass")) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    kept = name.encode(errors="surrogatepass")[: LONGEST_NAME - 17].decode(errors="ignore")
    return f"{kept}-{digest}"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is not JSON (an empty file after a power cut, say).
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or delete it") from error


def read_jsonl(path: Path, record: type[JsonlRecord]) -> Iterator[JsonlRecord]:
    """Yields the records of a JSON Lines file; stops at a line that a crash cut short.

    Args:
        path: the file; a missing one holds no records.
        record: the dataclass of a line; an unknown field is an error.

    Raises:
        UserError: a line before the last is not JSON, or does not fit the record.
    """
    known = {f.name for f in fields(record)}  # pyright: ignore[reportArgumentType]
    for number, row in enumerate(read_rows(path), start=1):
        if not isinstance(row, dict) or not row.keys() <= known:
            raise UserError(f"{path}:{number} is not a {record.__name__} record")
        yield record(**row)


def read_rows(path: Path) -> Iterator[Any]:
    """Yields the values of a JSON Lines file as `json` reads them; see `read_jsonl`.

    Raises:
        UserError: a line before the last is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the writer was killed inside this line
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON: {error}") from error


class JsonlWriter:
    """Appends records (dataclasses) to a JSON Lines file, each on disk before the next.

    Opening the file cuts off the half line that a killed writer left, so a file never holds a
    broken line in its middle. Use the writer as a context manager.
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
        """Appends one record. It survives if the process is killed, but not a power cut.

        Raises:
            OSError: the disk is full; the half line is removed first.
        """
        line = _dump(record)
        start = self._file.seek(0, os.SEEK_END)
        try:
            # When the disk is nearly full, one write may write only a part of the line.
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
        OSError: it cannot be written (the disk is full, say); the old file stays, and no partial
            file is left.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a crash leaves the old file or the new one, never half of one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    replace_file(path, text.encode())


def _dump(record: Any) -> bytes:
    text = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="surrogatepass")


def _end_of_last_line(file: Any, end: int) -> int:
    """The offset just after the last newline before `end`."""
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
