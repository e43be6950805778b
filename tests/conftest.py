"""Fixtures that several test modules share."""

import logging
import os
import shutil
import signal
import ssl
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from proxytune.loopback import without_proxies

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases of a `thinned` test as slow, except for the first ones."""
    cases = Counter[tuple[Path, str]]()
    for item in items:
        if mark := item.get_closest_marker("thinned"):
            test = (item.path, getattr(item, "originalname", item.name))
            cases[test] += 1
            if cases[test] > mark.args[0]:
                item.add_marker("slow")


# Two test processes with a thread per core each would wait for one another: of tiny models, one
# thread does the same work in a quarter of the time. Read when torch is first imported, so here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests' own clients (requests, urllib, openai) ask servers on this machine alone.
without_proxies()

# Every client of OpenAI's package reads all certificates anew, which takes 50 ms.
ssl.create_default_context = cache(ssl.create_default_context)

# A script's background jobs and `nohup` ignore these, and so would the commands that tests start
# and interrupt. With a handler that does nothing we go on ignoring them, and the commands do not.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real benchmark files beside the checkout; not part of the product."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the benchmark files in {folder}, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, expert and antiexpert (`api_triple.save_triple`); a module may have its own."""
    from tests.api_triple import save_triple

    return save_triple(tmp_path_factory.mktemp("triple"))


@pytest.fixture(scope="session")
def url(folder: Path) -> Iterator[str]:
    """The address of `folder`'s base behind our own server, which shows every log-probability."""
    from tests.api_triple import served

    with served(folder, max_logprobs=-1) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits a moment before it tries again, and measures blocks by a short prompt."""
    monkeypatch.setattr("proxytune.members.api.client.FIRST_WAIT", 0.02)
    monkeypatch.setattr("proxytune.members.api.blocks._LONG", 48)


@pytest.fixture(autouse=True)
def _full_errors_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets HYDRA_FULL_ERROR for its process, and a later test's commands inherit it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")


@pytest.fixture
def quick_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and git about the machine after every evaluation: seconds each."""
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
