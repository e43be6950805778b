"""What is installed from a wheel works outside of the checkout."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

import proxytune
from proxytune.files import ROOT

pytestmark = pytest.mark.slow

MODELS = ROOT / "pocket" / "models"
MAIN = "import proxytune.cli; proxytune.cli.main()"
PROMPT = "Question: What is 3 + 4?\nAnswer:"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel is installed; the environment has its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    # from a copy: a build leaves folders behind
    for name in ("conf", "proxytune", "tasks", "hydra_plugins", "results/paper"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    wheel = [*pip, "wheel", *offline, "-w", folder / "dist", folder / "source"]
    subprocess.run(wheel, check=True)
    (built,) = (folder / "dist").glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", built]
    subprocess.run(install, check=True)
    return folder / "site"


@pytest.fixture
def outside(site, tmp_path) -> dict:
    """Arguments of a process that knows the wheel, and not the checkout."""
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    place = {"cwd": tmp_path, "env": environment | {"OMP_NUM_THREADS": "1"}, "text": True}
    code = "import proxytune; print(proxytune.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **place)
    assert done.stdout.strip() == str(site / "proxytune" / "__init__.py")
    return place


@pytest.mark.parametrize("by_file", [False, True])
def test_a_wheel_serves_three_folders(outside, tmp_path, by_file):
    members = {role: MODELS / role for role in ("base", "expert", "antiexpert")}
    arguments = [f"triple.{role}.id={folder}" for role, folder in members.items()]
    arguments += [f"triple.{role}.dtype=float32" for role in members]  # else near ties may fall
    if by_file:
        lines = [f"{role}: {{id: {path}, dtype: float32}}\n" for role, path in members.items()]
        (tmp_path / "mine.yaml").write_text("".join(lines))
        arguments = [f"triple={tmp_path}/mine.yaml"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", *arguments, "port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **outside,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        client = openai.OpenAI(base_url=line.split()[3], api_key="none")
        (model,) = client.models.list().data
        assert model.id == ("mine-proxy" if by_file else "triple-proxy")
        answer = client.completions.create(
            model=model.id, prompt=PROMPT, max_tokens=20, temperature=0
        )
        alone = proxytune.load(*map(str, members.values()), dtype="float32", device="cpu")
        assert answer.choices[0].text == alone.generate([PROMPT], max_new_tokens=20)[0].text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_wheel_runs_an_experiment_into_the_working_directory(outside, tmp_path):
    arguments = [f"triple.{role}.id={MODELS / role}" for role in ("base", "expert", "antiexpert")]
    arguments += ["name=mine", "experiment=none", "task=pocket_gsm8k", "systems=[proxy]"]
    data = ROOT / "pocket" / "data" / "test" / "gsm8k.jsonl"
    arguments += [f"task.pocket_gsm8k.path={data}", "limit=2"]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "run", *arguments], capture_output=True, **outside
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "runs" / "mine" / "report.html").is_file()


def test_a_missing_extra_is_one_line(outside):
    code = f"import sys; sys.modules['hydra'] = None; {MAIN}"
    for command, extra in (("serve", "serve"), ("run", "experiments")):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "triple=pocket"], capture_output=True, **outside
        )
        assert done.returncode == 1
        assert done.stderr == (
            f"error: proxytune {command} needs hydra, which is not installed: "
            f"pip install 'proxytune[{extra}]'\n"
        )
