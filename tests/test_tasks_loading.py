"""Rows from files of every kind, and messages that name the way out."""

import gzip
import json

import pytest

from proxytune.errors import UserError
from tasks import loading
from tasks.loading import HubDataset, load_rows, read_rows

ROWS = [{"question": "a\u2028b", "answer": "é"}, {"question": "c", "answer": "d"}]
HUB = HubDataset("nobody/nothing-of-this-name")


def written(path, text: str):
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "json.gz", "jsonl.gz", "csv.gz"])
def test_kinds(tmp_path, ending):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = {
        "json": json.dumps(ROWS),
        "jsonl": "\n".join(lines),
        "csv": "\ufeffquestion,answer\r\na\u2028b,é\r\nc,d\r\n",
    }[ending.removesuffix(".gz")]
    assert read_rows(written(tmp_path / f"rows.{ending}", text)) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not json"),
        ("a.json", "{}", "list of objects"),
        ("a.jsonl", "[1]\n", "list of objects"),
        ("a.txt", "x", r"\.jsonl"),
    ],
)
def test_malformed(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path / name, text))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "nope"])
def test_what_json_cannot_be_is_no_traceback(tmp_path, text):
    for name in ("a.json", "a.jsonl.gz"):
        with pytest.raises(UserError, match=r"is not json"):
            read_rows(written(tmp_path / name, text))


@pytest.mark.slow
def test_archives_that_are_damaged_or_unpack_without_end(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl.gz", "{}\n" * 2**20)
    assert len(read_rows(path)) == 2**20
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:40] + bytes(20) + whole[60:], whole[:9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
            read_rows(path)
    path.write_bytes(whole)
    monkeypatch.setattr(loading, "_MOST_BYTES", 2**20)
    with pytest.raises(UserError, match="holds more than"):
        read_rows(path)


def test_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path / "a.jsonl")


def test_missing_file_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        load_rows(str(tmp_path / "none.jsonl"), HUB, None, setting="task.x.path")
    file = written(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"row 0 has no 'target'; it has question, answer"):
        load_rows(str(file), HUB, None, setting="task.x.path", columns=("target",))


@pytest.mark.parametrize("hub", [HUB, HubDataset("nobody/nothing", file="rows.json")])
def test_without_the_hub(hub, monkeypatch):
    # offline is known at once; a connection that fails takes retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"task\.x\.path=FILE") as error:
        load_rows(None, hub, "abc", setting="task.x.path")
    assert "nobody/nothing" in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("r.jsonl", ""), ("r.json", "[]"), ("r.csv", "q\n")])
def test_a_file_without_rows_is_refused(tmp_path, name, text):
    path = written(tmp_path / name, text)
    with pytest.raises(ValueError, match=r"holds no rows; give .*task\.x\.path=FILE"):
        load_rows(str(path), HUB, None, setting="task.x.path", columns=("q",))
