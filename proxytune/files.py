"""Files: their names, JSON Lines that are appended to, and whole-file replacement."""

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from proxytune.errors import UserError
from proxytune.shapes import fits, misfit, shape_of, typed

log = logging.getLogger(__name__)

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
        UserError: it is no name of one folder ("../x", "a/b", "", a name of 256 bytes), or steers
            a terminal.
    """
    odd = name in ("", ".", "..") or name.startswith("~") or re.search(r"[/\\]", name)
    if odd or not name.isprintable():
        raise UserError(
            f"{what}={name!r} becomes a folder: it takes a plain name, without / and \\; the "
            "place of the results is output_dir=..."
        )
    if len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        raise UserError(f"{what}={name[:40]}... is too long for a folder: at most 255 bytes")
    return name


def check_output_dir(output_dir: str) -> None:
    """Refuses a results folder whose name does not say where it is.

    Raises:
        UserError: it is empty, or begins with ~.
    """
    if not output_dir.strip():
        raise UserError("output_dir is empty; give a folder, or leave it out")
    if output_dir.startswith("~"):
        raise UserError(f"output_dir={output_dir}: write $HOME, for no shell expands ~ there")


def folder_name(text: str) -> str:
    """A folder's name for any text; different texts have different names.

    Separators, and what cannot be printed, are escaped as in URLs, and a text that is too long ends
    in a hash of the whole.
    """
    name = "".join(map(_printable, re.sub(r"[%/\\]|^[.~]", lambda c: f"%{ord(c[0]):02X}", text)))
    if len(name.encode(errors="surrogatepass")) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    kept = name.encode(errors="surrogatepass")[: LONGEST_NAME - 17].decode(errors="ignore")
    return f"{kept}-{digest}"


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return f"%{ord(char):02X}" if ord(char) < 256 else f"%u{ord(char):06X}"


def read_json(path: Path, shape: Any = None, **kinds: Any) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        shape: a `TypedDict` with total=False: if given, the content is an object, and those of its
            keys that the shape names have values of these types.
        kinds: if given, the content is an object that has these keys, with values of these types.

    Raises:
        UserError: it is not JSON (an empty file after a power cut, say), or another object.
        OSError: it cannot be read.
    """
    try:
        found = _loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or delete it") from error
    if (shape or kinds) and not isinstance(found, dict):
        raise UserError(f"{path} holds no object; restore it, or delete it")
    hints = {**(typed(shape) if shape else {}), **kinds}
    for key, hint in hints.items():
        if key not in found and key in kinds:
            raise UserError(f"{path} is damaged (it has no {key!r}); restore it, or delete it")
        if key in found and not fits(found[key], hint):
            why = f"its {key!r} is of another type"
            raise UserError(f"{path} is damaged ({why}); restore it, or delete it")
    return found


def read_jsonl(path: Path, record: type[JsonlRecord]) -> Iterator[JsonlRecord]:
    """Yields the records of a JSON Lines file; stops at a line that a crash cut short.

    Args:
        path: the file; a missing one holds no records.
        record: the dataclass of a line; a field that is unknown, missing or of another type is an
            error.

    Raises:
        UserError: a line before the last is not JSON, or does not fit the record.
    """
    for number, row in enumerate(read_rows(path), start=1):
        yield _as_record(row, record, f"{path}:{number}")


def _as_record(row: Any, record: type[JsonlRecord], place: str) -> JsonlRecord:
    """The record that a line holds.

    Raises:
        UserError: it does not fit; the message begins with `place`.
    """
    hints, needed = shape_of(record)
    why = misfit(row, hints, needed)
    if why:
        raise UserError(f"{place} is no {record.__name__}: {why}")
    try:
        return record(**{key: _nested(value, hints[key]) for key, value in row.items()})
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _nested(value: Any, hint: Any) -> Any:
    """The value of a field; a record within a record becomes one."""
    return hint(**value) if is_dataclass(hint) else value  # pyright: ignore[reportCallIssue]


def read_rows(path: Path) -> Iterator[Any]:
    """Yields the values of a JSON Lines file as `json` reads them; see `read_jsonl`.

    Raises:
        UserError: a line before the last is not JSON.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} is no file; move it away")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the writer was killed inside this line
            yield _row(line, f"{path}:{number}")


class JsonlFollower(Generic[JsonlRecord]):
    """Reads what somebody else appends to a JSON Lines file; it changes and locks nothing.

    Args:
        path: the file, which may come about later.
        record: the dataclass of a line.

    Attributes:
        restarts: how often the file was found replaced by another one, which is read from its
            beginning.
    """

    def __init__(self, path: Path, record: type[JsonlRecord]) -> None:
        self.path = path
        self.restarts = 0
        self._record = record
        self._inode: int | None = None
        self._offset = self._number = 0

    def new(self) -> Iterator[JsonlRecord]:
        """The records of the lines that were finished since the last call.

        Raises:
            UserError: a line is damaged, or the path is no file; the next call tries it again.
            OSError: it cannot be read, or is a symbolic link.
        """
        try:
            # a pipe in a stranger's folder must not hold us up
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        with FileIO(descriptor) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{self.path} is no file; move it away")
            if self._inode != status.st_ino or status.st_size < self._offset:
                self.restarts += self._inode is not None
                self._inode, self._offset, self._number = status.st_ino, 0, 0
            file.seek(self._offset)
            for line in BufferedReader(file):
                if not line.endswith(b"\n"):
                    return  # it is being written, or the writer was killed inside of it
                place = f"{self.path}:{self._number + 1}"
                found = _as_record(_row(line, place), self._record, place)
                self._offset += len(line)
                self._number += 1
                yield found


def _row(line: bytes, place: str) -> Any:
    """The value of a line.

    Raises:
        UserError: it is not JSON; the message begins with `place`.
    """
    try:
        return _loads(line)
    except ValueError as error:
        raise UserError(
            f"{place} is not JSON ({error}); restore the file, or delete this line"
        ) from error


def _loads(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON; NaN and Infinity are not, nor is nesting without end.
    """
    text = data.decode("utf-8", errors="surrogatepass").removeprefix("\ufeff")
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class JsonlWriter:
    """Appends records (dataclasses) to a JSON Lines file, each on disk before the next.

    Opening the file cuts off the half line that a killed writer left, so a file never holds a
    broken line in its middle. Use the writer as a context manager.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open_own(path)
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


def open_own(path: Path) -> FileIO:
    """Opens a file of a results folder to read it and to append to it; makes it if needed.

    Raises:
        OSError: it is a symbolic link: a folder from elsewhere must not lead to other files.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return FileIO(os.open(path, flags, 0o666), "ab+")


def check_plain_files(folder: Path) -> None:
    """Refuses a results folder that holds anything but files and folders.

    A symbolic link could lead the writing elsewhere, and who opens a named pipe waits for ever. The
    folder itself may be reached through a link. Weights & Biases makes links of its own.

    Raises:
        UserError: the message names the first such thing.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "wandb"]
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, and nothing is written through one; "
                    "replace it by what it leads to"
                )
            if not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is neither a file nor a folder; move it away")


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a crash leaves the old file or the new one, never half of one.

    Raises:
        OSError: it cannot be written (the disk is full, say); the old file stays, and no partial
            file is left.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.unlink(missing_ok=True)  # a killed writer's, or a link
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def set_aside(path: Path, why: UserError) -> None:
    """Renames a damaged file that can be made again, and says so."""
    path.replace(path.with_name(path.name + ".damaged"))
    log.warning("%s; it is kept as %s.damaged, and made anew", why, path.name)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a crash leaves the old file or the new one, never half of one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    replace_file(path, text.encode())


def _dump(record: Any) -> bytes:
    # `asdict` would copy every list of a long trace first.
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_fields)
    return (text + "\n").encode("utf-8", errors="surrogatepass")


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, for `json.dumps`, which refuses any other object."""
    if not is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"Object of type {type(record).__name__} is not JSON serializable")
    return {field.name: getattr(record, field.name) for field in fields(record)}


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
