"""JSON Lines files survive a killed writer, a full disk and odd text."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.files import JsonlWriter, read_jsonl, write_jsonl
from proxytune.records import Completion, Decoding, DecodingSettings, Score


def completion(text: str = "a", sample: int = 0) -> Completion:
    return Completion("x", sample, text, text, [1, 2], "eos", {"base": "h"}, {})


@given(st.text(alphabet=st.characters(), max_size=50))
def test_any_text_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("jsonl") / "c.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(completion(text))
    assert [c.text for c in read_jsonl(path, Completion)] == [text]


def test_a_lone_surrogate_comes_back(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [completion("\ud800")])
    assert next(read_jsonl(tmp_path / "c.jsonl", Completion)).text == "\ud800"


def test_a_half_line_is_ignored_and_then_overwritten(tmp_path):
    path = tmp_path / "c.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(completion("whole"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert [c.text for c in read_jsonl(path, Completion)] == ["whole"]
    with JsonlWriter(path) as writer:
        writer.write(completion("next", sample=1))
    assert [c.text for c in read_jsonl(path, Completion)] == ["whole", "next"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "c.jsonl"
    write_jsonl(path, [completion(), completion()])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"{broken}\n" + lines[1])
    with pytest.raises(ValueError, match=r"c\.jsonl:1 is not JSON"):
        list(read_jsonl(path, Completion))


def test_another_records_file_is_refused(tmp_path):
    write_jsonl(tmp_path / "s.jsonl", [Score("x", {"acc": 1.0})])
    with pytest.raises(ValueError, match="is no Completion"):
        list(read_jsonl(tmp_path / "s.jsonl", Completion))


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path):
    """On a real small file system, since a mock would only show that we handle the mock."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        path = mount / "c.jsonl"
        with JsonlWriter(path) as writer, pytest.raises(OSError) as caught:
            for sample in range(1000):
                writer.write(completion("y" * 500, sample))
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        kept = list(read_jsonl(path, Completion))
        assert len(kept) > 10
        assert path.read_bytes().endswith(b"\n")
        assert [c.sample for c in kept] == list(range(len(kept)))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_write_jsonl_replaces_the_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    write_jsonl(path, [completion("old")])

    def crash(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError):
        write_jsonl(path, [completion("new")])
    assert [c.text for c in read_jsonl(path, Completion)] == ["old"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("n", 0),
        ("stop", ("",)),
    ],
)
def test_impossible_decoding_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field.split("_")[0]):
        dataclasses.replace(Decoding(), **{field: value})


def test_every_setting_has_its_keyword():
    names = {field.name for field in dataclasses.fields(Decoding)}
    assert DecodingSettings.__annotations__.keys() == names


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    # a limit on file sizes, in a process of its own, stands for a full disk
    code = (
        "import resource, signal, sys, pathlib\n"
        "from proxytune.files import replace_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    replace_file(pathlib.Path(sys.argv[1]), b'x' * 5000)\n"
        "except OSError as error:\n"
        "    print(error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.strip() == str(path), done.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
