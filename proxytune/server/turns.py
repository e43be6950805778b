"""Turns: workers whose systems share models decode one at a time."""

import threading
from collections import deque
from collections.abc import Iterable

from proxytune.generator import Generator


class Turns:
    """A lock that goes to the thread that has waited for it longest.

    A pass over packed rows sets the model's attention while it runs, so two threads must not be in
    one model. With an ordinary lock the thread that gives it back takes it again, and the others
    starve.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._queue: deque[threading.Lock] = deque()  # the holder's gate, then those that wait

    def __enter__(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        with self._changing:
            self._queue.append(gate)
            if len(self._queue) == 1:
                return
        gate.acquire()  # opened by the holder before

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._queue.popleft()
            if self._queue:
                self._queue[0].release()


def share_models(generators: Iterable[Generator]) -> bool:
    """Whether a model belongs to two of the systems."""
    seen: set[int] = set()
    for generator in generators:
        own = {id(each.model) for each in generator.members.values() if each.model is not None}
        if seen & own:
            return True
        seen |= own
    return False
