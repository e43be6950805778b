"""Fixtures that several test modules share."""

import os
import signal
from pathlib import Path

import pytest

from proxytune.loopback import without_proxies

ROOT = Path(__file__).resolve().parent.parent

# Two test processes with a thread per core each would wait for one another: of tiny models, one
# thread does the same work in a quarter of the time. Read when torch is first imported, so here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests' own clients (requests, urllib, openai) ask servers on this machine alone.
without_proxies()

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


@pytest.fixture(autouse=True)
def _full_errors_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets HYDRA_FULL_ERROR for its process, and a later test's commands inherit it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
