"""How many processes share a run, and what each of them holds; docs/scale.md."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from omegaconf import DictConfig

from proxytune.config.schema import to_dict
from proxytune.config.specs import engine_settings
from proxytune.errors import UserError, need
from proxytune.loading.launched import launched
from proxytune.vllm.settings import OWN


def uses_ray(cfg: DictConfig) -> bool:
    """Whether replicas on Ray generate."""
    return cfg.machine.replicas > 1 or cfg.machine.ray_address is not None


def check_placement(cfg: DictConfig, members: Collection[str]) -> None:
    """Refuses a placement that cannot be, before a model is loaded.

    Args:
        cfg: a resolved `RunConfig`.
        members: the names in the triple of the models in use.

    Raises:
        UserError: a number below 1, Ray is missing, a model or an engine that cannot be shared.
    """
    for key in ("replicas", "tensor_parallel"):
        if cfg.machine[key] < 1:
            raise UserError(f"machine.{key}={cfg.machine[key]}: it must be at least 1")
    _check_max_memory(cfg)
    _check_ranks(cfg, members)
    if uses_ray(cfg):
        _check_replicas(cfg, members)


def check_alone(cfg: DictConfig) -> None:
    """Refuses several processes where one serves.

    Args:
        cfg: a resolved `ServeConfig`.

    Raises:
        UserError: the setting, and what to do instead.
    """
    for key, none in (("replicas", 1), ("tensor_parallel", 1), ("ray_address", None)):
        if cfg.machine[key] != none:
            raise UserError(
                f"machine.{key}={cfg.machine[key]} is a setting of run.py; serve the triple on "
                "several GPUs with engine=vllm, or start several servers"
            )
    _check_max_memory(cfg)


def _check_replicas(cfg: DictConfig, members: Collection[str]) -> None:
    machine = cfg.machine
    name = (
        "machine.ray_address" if machine.replicas == 1 else f"machine.replicas={machine.replicas}"
    )
    need("ray", "ray", name)
    if cfg.triple.vocabulary == "map":
        raise UserError(
            f"{name}: replicas run vocabulary=strict and special; with vocabulary=map use one "
            "process, or machine.tensor_parallel"
        )
    if engine_settings(cfg).name != OWN:
        raise UserError(
            f"{name} is a setting of engine=own; vLLM spreads its work itself "
            "(engine.options.data_parallel_size)"
        )
    _check_no_api(cfg, members, name)


def _check_ranks(cfg: DictConfig, members: Collection[str]) -> None:
    """Refuses tensor parallelism that is set up by half."""
    parts, (_, world) = cfg.machine.tensor_parallel, launched()
    name = f"machine.tensor_parallel={parts}"
    if parts != world:
        started = f"torchrun started {world} processes" if world > 1 else "this is one process"
        way_out = (
            f"torchrun --nproc_per_node {parts} run.py ..."
            if parts > 1
            else (f"say machine.tensor_parallel={world}, or start run.py by python")
        )
        raise UserError(f"{name}, and {started}: {way_out}")
    if parts == 1:
        return
    if engine_settings(cfg).name != OWN:
        raise UserError(f"{name} is a setting of engine=own; vLLM's is engine.tensor_parallel_size")
    if uses_ray(cfg):
        raise UserError(f"{name} and replicas exclude each other; choose one of them")
    if cfg.machine.cuda_graphs:
        raise UserError(f"{name}: machine.cuda_graphs is for models on one GPU each; leave it out")
    _check_no_api(cfg, members, name)
    placed = [f"machine.devices.{role}" for role in cfg.machine.devices or {}]
    placed += [f"triple.{role}.device" for role in members if cfg.triple[role].device]
    if placed:
        raise UserError(f"{name} divides every model among all processes; leave {placed[0]} out")
    for role in sorted(members):
        for key in ("adapter", "quantization"):
            if cfg.triple[role][key]:
                raise UserError(
                    f"{name}: triple.{role}.{key} was not tried on parts of a model; use "
                    "replicas, or machine=sharded"
                )


def _check_no_api(cfg: DictConfig, members: Collection[str], name: str) -> None:
    asked = next((role for role in sorted(members) if cfg.triple[role].api is not None), None)
    if asked is not None:
        raise UserError(
            f"{name}: the {asked} is behind an API, whose cache and spending limits one process "
            "keeps; leave it out (rows and requests run side by side in one process, too)"
        )


def _check_max_memory(cfg: DictConfig) -> None:
    """Refuses limits that accelerate would not understand, and those that nothing would heed."""
    limits = to_dict(cfg.machine.max_memory) if cfg.machine.max_memory else {}
    for device, limit in limits.items():
        known = device in ("cpu", "disk") or device.isdecimal()
        size = (isinstance(limit, int) and limit >= 0) or re.fullmatch(
            r"\d+(\.\d+)?[KMG]i?B", str(limit)
        )
        if not known or not size:
            raise UserError(
                f"machine.max_memory={{{device}: {limit}}}: it takes a GPU's number, cpu or disk, "
                "and a size as in {0: 20GiB, cpu: 60GiB}"
            )
    if limits and "auto" not in (cfg.machine.devices or {}).values():
        raise UserError(
            "machine.max_memory is for a model that is spread over all GPUs; machine=sharded, or "
            "machine.devices.base=auto, spreads the base"
        )


def ray_pool(
    cfg: DictConfig,
    specs: Mapping[str, Any],
    systems: Mapping[str, Mapping[str, str]],
    make_pool: Callable[[], Any],
    ran: list[Any],
) -> AbstractContextManager[Any]:
    """The pool of a run whose systems are replicas on Ray.

    Args:
        cfg: a resolved `RunConfig`.
        specs: role of the triple -> what to load.
        systems: system -> the engine's role -> the triple's name.
        make_pool: makes the pool of one replica.
        ran: gets a record for each replica.
    """
    from proxytune.experiment.ray_crew import RayCrew, RayPool, gpus_of_replica
    from proxytune.experiment.replicas import Replica

    size, address = cfg.machine.replicas, cfg.machine.ray_address
    here = max(1, (os.cpu_count() or 1) // size) if address is None else 1
    threads = cfg.machine.threads or here
    make_crew = partial(
        RayCrew,
        size,
        partial(Replica, make_pool, threads),
        gpus=partial(gpus_of_replica, specs, size),
        threads=threads,
        address=address,
    )
    return RayPool(specs, systems, make_crew, ran)
