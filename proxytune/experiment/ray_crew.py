"""Replicas as Ray actors: `machine.replicas=N`, `machine.ray_address=...`; docs/scale.md."""
# pyright: reportMissingImports=false

import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from proxytune.errors import UserError, extra
from proxytune.experiment.replicas import Answer, Ran, Replica, Replicas, open_replicas
from proxytune.loading.spec import ModelSpec

log = logging.getLogger(__name__)

_STARTS = 4  # times that Ray may try to start on a busy machine
_STORE_BYTES = 200 * 2**20  # of Ray's shared memory: prompts and completions are small


class RayCrew:
    """The replicas of a run. Ray starts one that has died again, and repeats its calls.

    Args:
        size: how many replicas.
        make: makes one, in its process.
        gpus: of each replica, by the number that there are.
        threads: CPU threads of each.
        address: of a Ray cluster that is joined; None starts one on this machine, for this run.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it is too small.
    """

    def __init__(
        self,
        size: int,
        make: Callable[[], Replica],
        *,
        gpus: Callable[[int], int],
        threads: int,
        address: str | None,
    ) -> None:
        with extra("ray", f"machine.replicas={size}"):
            import ray
        self.size = size
        self._ray: Any = ray
        _start(ray, size, threads, address)
        try:
            each = gpus(int(ray.cluster_resources().get("GPU", 0)))
            _check_room(ray, size, each, threads)
            actor = self._ray.remote(
                num_cpus=threads, num_gpus=each, max_restarts=-1, max_task_retries=-1
            )(_Actor)
            self._actors = [actor.remote(make) for _ in range(size)]
        except BaseException:
            ray.shutdown()
            raise

    def submit(self, replica: int, method: str, system: str, *arguments: Any) -> Any:
        """See `Crew.submit`."""
        return self._actors[replica].call.remote(method, system, *arguments)

    def wait(self, tickets: Sequence[Any]) -> Any:
        """See `Crew.wait`."""
        (ready, *_), _ = self._ray.wait(list(tickets), num_returns=1)
        return ready

    def answer(self, ticket: Any) -> Answer:
        """See `Crew.answer`."""
        try:
            return self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):  # Ray's own message is a traceback
                raise error.cause from None
            raise

    def close(self) -> None:
        """Ends the replicas, and the cluster if this run has started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


class _Actor:
    """The process of one replica."""

    def __init__(self, make: Callable[[], Replica]) -> None:
        self._replica = make()

    def call(self, method: str, system: str, *arguments: Any) -> Answer:
        """See `Replica.call`."""
        return self._replica.call(method, system, *arguments)


class RayPool:
    """Gives a run its systems, each as replicas on Ray.

    Use it as a context manager: at its end the replicas are gone, and so is their memory.

    Args:
        specs: role of the triple -> what to load.
        systems: system -> the engine's role -> the triple's name.
        make_crew: starts the replicas.
        ran: gets a record for each replica, for run.json.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        systems: Mapping[str, Mapping[str, str]],
        make_crew: Callable[[], RayCrew],
        ran: list[Ran],
    ) -> None:
        self._specs = specs
        self._systems = systems
        self._make_crew = make_crew
        self._crew: RayCrew | None = None
        self._ran = ran

    def open(self, system: str) -> Replicas:
        """Starts the replicas if need be, and loads the system in each of them."""
        if self._crew is None:  # not before something is missing: it takes seconds
            self._crew = self._make_crew()
            self._ran += [Ran() for _ in range(self._crew.size)]
        specs = {role: self._specs[name] for role, name in self._systems[system].items()}
        return open_replicas(self._crew, system, specs, self._ran)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._crew is not None:
            self._crew.close()


def gpus_of_replica(specs: Mapping[str, ModelSpec], replicas: int, total: int) -> int:
    """How many GPUs each replica needs for its triple's placement.

    Args:
        specs: role -> model, with the machine's devices filled in.
        replicas: how many share the GPUs.
        total: the GPUs that there are.
    """
    devices = {spec.device for spec in specs.values()}
    if total == 0 or devices == {"cpu"}:
        return 0
    named = [torch.device(each).index or 0 for each in devices if each not in (None, "auto", "cpu")]
    least = 1 + max(named, default=0)
    return max(least, total // replicas) if "auto" in devices else least


def _start(ray: Any, size: int, threads: int, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        else:
            _start_here(ray, size * threads)
    except (ConnectionError, ValueError) as error:
        if address is None:
            raise
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"machine.ray_address={address}: no Ray cluster can be joined there ({why}); "
            "`ray start --head` starts one"
        ) from error
    finally:
        for number, handler in before.items():  # Ray's would end the run without our line
            signal.signal(number, handler)


def _start_here(ray: Any, threads: int) -> None:
    """Starts a cluster on this machine, for this run."""
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(
                num_cpus=threads,
                num_gpus=torch.cuda.device_count(),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=_STORE_BYTES,
            )
            return
        except Exception as error:  # Ray raises no other kind here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == _STARTS:
                raise UserError(
                    f"Ray did not start within its 30 seconds, {_STARTS} times: this machine has "
                    "too much else to do"
                ) from error
            log.warning("Ray did not start within its 30 seconds; once more")


def _check_room(ray: Any, size: int, gpus: int, threads: int) -> None:
    """Refuses replicas that the cluster has no room for: Ray would wait for ever."""
    has = ray.cluster_resources()
    for name, each in (("GPU", gpus), ("CPU", threads)):
        if each * size > has.get(name, 0):
            raise UserError(
                f"machine.replicas={size} needs {each * size} {name}s ({each} for each), and there "
                f"are {int(has.get(name, 0))}; take fewer replicas, or a larger cluster"
            )
