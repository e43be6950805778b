"""`--help` and `proxytune doctor`."""

import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields

import pytest

import proxytune.cli
from proxytune.cli import doctor, helping
from proxytune.config import schema
from proxytune.files import ROOT
from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("command", ["run", "check", "serve", "vllm-command"])
def test_help_names_every_group_option_and_setting(command):
    page = helping.page(command)
    groups = {"run": helping.GROUPS, "check": ("triple", "task", "decoding", "formula")}
    for group in groups.get(command, ("triple", "formula", "machine", "engine")):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in page
    own = {"run": [schema.RunConfig], "check": [schema.CheckConfig]}
    kinds = own.get(command, [schema.ServeConfig, ServerSettings])
    named = {each.name for kind in kinds for each in fields(kind)}
    nodes = {"triple", "task", "decoding", "machine", "engine", "tracking", "formula"}
    for name in named - nodes - {"root", "paper", "needs"}:
        assert f"\n  {name} " in page
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.thinned(1)
@pytest.mark.parametrize("words", [["--help"], ["triple=pocket", "-h"]])
def test_help_comes_before_anything_is_composed(words):
    script = (
        "import sys; sys.argv[1:] = sys.argv[1:]; import proxytune.cli as c; c.main();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: proxytune serve") and done.stdout.endswith("[]\n")


def test_the_commands_are_listed(monkeypatch, capsys):
    for words, status in ((["--help"], 0), (["sreve"], 2), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["proxytune", *words])
        with pytest.raises(SystemExit) if status else nullcontext() as end:
            proxytune.cli.main()
        assert end is None or end.value.code == status
        printed = capsys.readouterr()
        page = printed.err if status else printed.out
        assert all(f"  {name} " in page for name in (*proxytune.cli.COMMANDS, "doctor"))
        assert ("there is no command sreve" in page) == (words == ["sreve"])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--help"], "usage: proxytune doctor"), (["localhost:8000"], "begins with http://")],
)
def test_the_doctor_takes_addresses_alone(words, said, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda urls: pytest.fail(f"asked {urls}"))
    with pytest.raises(SystemExit):
        doctor.doctor(words)
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


@pytest.mark.slow
def test_the_examples_of_help_compose():
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for command, examples in helping._EXAMPLES.items():
            for line, _ in examples:
                words = line.split()[2:]
                name = {"run": "config", "check": "check"}.get(command, "serve")
                if "-m" not in words and "/path/mine.yaml" not in line:
                    compose(name, words)


def test_the_doctor_says_what_can_be_reached_without_secrets(monkeypatch, capsys):
    dead = socket.create_server(("127.0.0.1", 0))
    nobody = f"http://127.0.0.1:{dead.getsockname()[1]}"
    dead.close()
    for name in ("HF_ENDPOINT", "WANDB_BASE_URL", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, nobody)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # no proxy is asked for what runs on this machine
    monkeypatch.setenv("http_proxy", "http://me:geheim@127.0.0.1:9")
    with running(create_app(proxytune.load(tiny_model(), tokenizer=tiny_tokenizer()))) as url:
        doctor.doctor([url.replace("://", "://me:geheim@") + "/models"])
    printed = capsys.readouterr().out
    for part in ("torch ", "serve: ", " cores, ", "GB of disk free", f"Python {sys.version[:4]}"):
        assert part in printed
    assert f"hub: {nobody} cannot be reached" in printed and "HF_TOKEN is set" in printed
    assert "OPENAI_API_KEY not set" in printed
    assert "/v1/models answers 200" in printed
    assert "geheim" not in printed and "hf_abc" not in printed


def test_the_doctor_names_what_an_extra_lacks(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "uvicorn" else real(name))
    assert "serve: lacks uvicorn" in list(doctor._extras())
