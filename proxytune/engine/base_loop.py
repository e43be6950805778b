"""What a decode loop is to those who drive it, whichever engine chooses the tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice

from proxytune.engine.rows import Finished, Request


class Loop(ABC):
    """Continues many prompts at once. All methods are called between steps."""

    def run(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Yields every sample of every request as soon as it ends.

        Args:
            requests: taken one by one, as rows become free.
        """
        source = iter(requests)
        more = True
        try:
            while True:
                wanted = max(0, self._wanted()) if more else 0
                taken = list(islice(source, wanted))
                more = more and len(taken) == wanted
                for request in taken:
                    self.add(request)
                if not self.busy:
                    return
                yield from self.step(more)
        finally:
            self.clear()

    @property
    @abstractmethod
    def running(self) -> int:
        """How many rows run; without those set aside."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether anything runs or waits."""

    @property
    @abstractmethod
    def paused(self) -> int:
        """How many samples are set aside, those that have not begun included."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queues a request until rows are free."""

    @abstractmethod
    def step(self, more: bool = False) -> list[Finished]:
        """Goes one step on with every row; the samples that have ended.

        Args:
            more: whether further requests are coming.
        """

    @abstractmethod
    def pause(self, indices: Iterable[int]) -> None:
        """Sets the requests with these indices aside until `resume`; their texts do not change."""

    @abstractmethod
    def resume(self, indices: Iterable[int]) -> None:
        """Lets requests that `pause` has set aside go on."""

    @abstractmethod
    def cancel(self, index: int) -> None:
        """Drops the requests with this index; their rows leave unfinished."""

    @abstractmethod
    def clear(self) -> None:
        """Drops everything that runs or waits, and frees its memory."""

    @abstractmethod
    def _wanted(self) -> int:
        """How many further requests `run` should take."""
