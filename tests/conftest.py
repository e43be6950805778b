"""Fixtures that several test modules share."""

import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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
