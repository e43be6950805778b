"""Every script explains itself at once and in its own words."""

import subprocess
import sys

import pytest

from proxytune.files import ROOT

pytestmark = pytest.mark.slow

COMMANDS = sorted(
    [
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("scripts/**/*.py"), ROOT / "run.py"]
        if 'if __name__ == "__main__"' in path.read_text()
    ]
)
# what takes seconds to import; pretrain.py is started by build.py, and is a training throughout
HEAVY = {"torch", "transformers", "datasets", "peft", "lm_eval", "alpaca_eval"}
SLOW = {"scripts/pocket/pretrain.py"}
# all of them in one process, for half a second each adds up
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, before = [path, "--help"], set(sys.modules)
    sys.path.insert(0, path.rpartition("/")[0] or ".")
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (path, end.code)
    heavy = {heavy} & (set(sys.modules) - before)
    print(f"\\n<{path}> {sorted(heavy)}", flush=True)
""".replace("{heavy}", repr(HEAVY))


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, list[str]]]:
    """Script -> what --help printed, and what heavy it imported; stderr has to be empty."""
    quick = [command for command in COMMANDS if command not in SLOW]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *quick], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found, text = {}, ""
    for line in done.stdout.splitlines():
        path, _, heavy = line.removeprefix("<").partition("> ")
        if path in quick and line.startswith("<"):
            found[path], text = (text, heavy), ""
        else:
            text += line + "\n"
    return found


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in SLOW])
def test_help_comes_at_once_and_alone(command, said):
    text, heavy = said[command]
    assert heavy == "[]", "what --help does not need is imported where it is used"
    assert text.strip().startswith(("usage: ", "python ")), text[:200]
