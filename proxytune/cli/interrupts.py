"""SIGTERM and SIGHUP end a command as Ctrl-C does; a second one ends it at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# `timeout`, make and shells may send a signal twice: to a process and to its group. Signals within
# this time are one interrupt.
_ONE_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end. It is raised so that open files and sockets are closed.

    Attributes:
        exit_code: a shell's code for a process that the signal ended (130 for Ctrl-C).
        said: the signal, for people.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.said = "interrupted" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` in the block when SIGINT, SIGTERM or SIGHUP arrives.

    A signal that is ignored (`nohup`) or already has a handler keeps its handling.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    process = os.getpid()
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != process:  # a forked child ends by the signal, as it would without us
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
