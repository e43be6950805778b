"""A benchmark's rows: from a local file, or from the Hugging Face hub at a pinned revision."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from proxytune.errors import UserError

Row = dict[str, Any]

_MOST_BYTES = 2**31  # of a text; a small archive may hold any number of them
_BLOCK = 2**20  # bytes that are unpacked at a time


@dataclass(frozen=True)
class HubDataset:
    """The place of a dataset on the Hugging Face hub.

    Attributes:
        id: the repository ("openai/gsm8k").
        config: the configuration's name; None if the dataset has only one.
        split: "test", "validation", ...
        file: a JSON file of the repository to read instead, for repositories that are loaded by
            a script (`datasets` no longer runs scripts).
    """

    id: str
    config: str | None = None
    split: str = "test"
    file: str | None = None


def load_rows(
    path: str | None,
    hub: HubDataset,
    revision: str | None,
    *,
    setting: str,
    columns: Sequence[str] = (),
) -> list[Row]:
    """The rows of a local file if one is given, else of the hub dataset.

    Args:
        path: .json, .jsonl or .csv, each optionally with .gz; None takes the hub.
        hub: the dataset.
        revision: the hub commit; None is the newest.
        setting: the setting that gives `path` ("task.gsm8k.path"), for messages.
        columns: the columns that every row must have.

    Raises:
        UserError: the file does not exist, is malformed or empty, or the hub cannot be reached.
    """
    if path is not None:
        rows = read_rows(Path(path).expanduser())
        source = path
    else:
        rows = _from_hub(hub, revision, setting)
        source = hub.id
    if not rows:
        raise UserError(f"{source} holds no rows; give a file that does: {setting}=FILE")
    check_columns(rows, columns, source)
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a .json (a list), .jsonl or .csv file, each optionally gzipped.

    Raises:
        UserError: the file does not exist, has another ending, or is malformed.
    """
    text = read_text(path)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind not in ("jsonl", "json", "csv"):
        raise UserError(f"{path}: rows are read from .json, .jsonl or .csv (or .gz of them)")
    try:
        if kind == "jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind == "json":
            rows = json.loads(text)
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, RecursionError, csv.Error) as error:  # too many digits, nested too deeply
        raise UserError(f"{path} is not {kind}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} does not hold a list of objects")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, gzipped or not, without a byte-order mark.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            packed = gzip.GzipFile(fileobj=io.BytesIO(data))
            blocks = iter(partial(packed.read, _BLOCK), b"")
            data = b"".join(islice(blocks, _MOST_BYTES // _BLOCK + 1))
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: there is no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} holds more than {_MOST_BYTES >> 30} GiB of text; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check_columns(rows: Iterable[Row], columns: Sequence[str], source: str) -> None:
    """Refuses rows that lack a column, or hold null or NaN in it.

    Raises:
        UserError: the message names the first such row and column.
    """
    for number, row in enumerate(rows):
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{source}: row {number} has no {column!r}; it has {', '.join(map(str, row))}"
                )
            if (value := row[column]) is None or value != value:
                raise UserError(f"{source}: the {column!r} of row {number} is {value}")


def _from_hub(hub: HubDataset, revision: str | None, setting: str) -> list[Row]:
    # These import slowly, and a local file needs none of them.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if hub.file is not None:
            name = hf_hub_download(hub.id, hub.file, repo_type="dataset", revision=revision)
            return read_rows(Path(name))
        dataset = load_dataset(hub.id, hub.config, split=hub.split, revision=revision)
    except (OSError, DatasetsError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        wanted = f"{hub.id}{'' if hub.config is None else f' ({hub.config})'}"
        at = "" if revision is None else f" at revision {revision}"
        raise UserError(
            f"the dataset {wanted}{at} cannot be had from the Hugging Face hub ({reason}); "
            f"give a local copy instead: {setting}=FILE"
        ) from error
    return [dict(row) for row in dataset]  # pyright: ignore[reportArgumentType, reportCallIssue]
