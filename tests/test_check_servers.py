"""The script that tries real servers, on a stand-in for one: our own server of the base alone."""

import sys

import pytest

from proxytune.files import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import check_servers

STAND_IN = f"""#!{sys.executable}
import sys

if sys.argv[1] == "-c":
    print("0.0.1")
    sys.exit()
import uvicorn

import proxytune
from proxytune.server import ServerSettings, create_app

value = dict(zip(sys.argv, sys.argv[1:]))
base = proxytune.load(value["--model"], dtype=value["--dtype"])
app = create_app({{value["--served-model-name"]: base}}, ServerSettings(max_logprobs=-1))
uvicorn.run(app, port=int(value["--port"]), log_level="error")
"""


@pytest.fixture
def stand_in(tmp_path) -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_every_way_of_asking_is_tried(stand_in, capsys):
    check_servers.main(["--vllm", stand_in, "--prompts", "1"])
    said = capsys.readouterr().out
    assert "--llama-server is not given: skipped" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| vLLM 0.0.1")]
    assert len(rows) == 4
    for row in rows:
        equal, flagged, silent = map(int, row[3:6])
        assert equal + flagged == 5 and silent == 0
        assert equal == 5 or "=20" in row[1]


def test_a_server_that_does_not_start_is_named():
    command = (sys.executable, "-c", "print('no memory {port}')")
    server = check_servers.Server("vLLM", command, command, {})
    with (
        pytest.raises(check_servers.UserError, match="vLLM does not start: no memory"),
        check_servers.running(server),
    ):
        pass


def test_nothing_given_is_one_line(capsys):
    with pytest.raises(check_servers.UserError, match="no server is given"):
        check_servers.main([])
    with pytest.raises(check_servers.UserError, match="GGUF"):
        check_servers.main(["--llama-server", "x"])
