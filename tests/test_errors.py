"""Whose mistake an error is, and the names that become folders."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.cli.guard import guarded, is_mistake
from proxytune.errors import MissingExtra, Unanswered, UserError
from proxytune.files import LONGEST_NAME, check_name, folder_name, read_json


def test_a_mistake_of_the_user_is_one_line(capsys):
    def command():
        raise UserError("limit=0: it must be at least 1")

    with pytest.raises(SystemExit) as end:
        guarded(command)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: limit=0: it must be at least 1\n"


@pytest.mark.parametrize(
    "bug",
    [
        lambda: list(zip([1], [1, 2], strict=True)),
        lambda: int("x"),
        lambda: {}["x"],
        lambda: [].pop(),
        lambda: (_ for _ in ()).throw(OSError("no errno: not the machine's word")),
    ],
)
def test_a_bug_of_ours_keeps_its_traceback_and_asks_for_a_report(bug, capsys):
    with pytest.raises(Exception) as caught:
        guarded(lambda: guarded(bug))
    assert caught.value.__notes__ == [
        f"If {__file__} is yours, mend it there; "
        "else this is a bug in proxytune: please report it, with the lines above."
    ]
    assert "error:" not in capsys.readouterr().err


def test_a_bug_in_the_package_is_nobody_elses(capsys):
    with pytest.raises(AttributeError) as caught:
        guarded(lambda: check_name("name", None))  # pyright: ignore[reportArgumentType]
    assert caught.value.__notes__ == [
        "This is a bug in proxytune: please report it, with the lines above."
    ]


def test_the_words_of_the_machine_and_of_servers_are_no_bugs():
    assert is_mistake(OSError(errno.ENOSPC, "No space left on device"))
    assert is_mistake(FileNotFoundError(errno.ENOENT, "No such file", "x.json"))
    assert is_mistake(Unanswered("nobody answered for 600 seconds"))
    assert not is_mistake(ValueError("zip() argument 2 is longer than argument 1"))


def test_a_missing_extra_names_itself():
    error = MissingExtra("serve", "proxytune serve", "uvicorn")
    assert str(error) == (
        "proxytune serve needs uvicorn, which is not installed: pip install 'proxytune[serve]'"
    )


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "", ".", "..", "~", "~me", "a\\b", "a\nb"])
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(UserError, match="becomes a folder"):
        check_name("name", name)


def test_names_of_more_bytes_than_a_file_system_takes_are_refused():
    assert check_name("name", "ü" * 127)
    with pytest.raises(UserError, match="at most 255 bytes"):
        check_name("name", "ü" * 128)


def test_ordinary_points_of_a_sweep_keep_their_names():
    point = "alpha=0.5,systems=[base,proxy],task=[pocket_gsm8k]"
    assert folder_name(point) == point


@given(st.text(min_size=1, max_size=400))
def test_any_text_has_a_folder_name(text):
    name = folder_name(text)
    assert check_name("name", name) == name
    assert len(name.encode(errors="surrogatepass")) <= LONGEST_NAME


@given(st.lists(st.text("ab/%\\.~", min_size=1, max_size=6), unique=True, max_size=20))
def test_different_texts_have_different_names(texts):
    assert len({folder_name(text) for text in texts}) == len(texts)
    assert len({folder_name("x" * 300 + text) for text in texts}) == len(texts)


def test_a_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("")
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        read_json(path)
