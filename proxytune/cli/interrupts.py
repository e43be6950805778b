"""SIGTERM and SIGHUP end a command as Ctrl-C does; a second one ends it at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# `timeout`, make and shells send a signal to a process and to its group; that is one interrupt
_ONE_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal that asks this process to end; everything between closes what it has open.

    Attributes:
        exit_code: what a shell reports of a process that the signal ended (130 for Ctrl-C).
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.said = "interrupted" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` in the block when the process is told to end.

    A signal that is ignored (`nohup`) or has a handler already stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread only
        return
    process = os.getpid()
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != process:  # a forked child dies of it as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        now = time.monotonic()
        if not first:
            first = now
            raise Interrupted(number)
        if now - first > _ONE_S:
            os.write(2, b"interrupted again: ended at once\n")
            os._exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [n for n, was in before.items() if was in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def hush() -> None:
    """Keeps the interpreter's last flush quiet when nobody reads the output (`| head -1`)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
