"""`proxytune serve`: binds the port, loads a system, and runs the app with uvicorn."""

import gc
import ipaddress
import logging
import signal
import socket
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from proxytune.config.schema import to_dict
from proxytune.config.specs import engine_settings, model_specs
from proxytune.errors import UserError
from proxytune.roles import SYSTEMS
from proxytune.server.settings import ServerSettings
from proxytune.vllm.settings import OWN, VLLM

log = logging.getLogger(__name__)


def serve(cfg: DictConfig, triple: str | None) -> None:
    """Serves the system of a resolved `ServeConfig` until it is interrupted.

    Args:
        cfg: the configuration.
        triple: the chosen file of conf/triple, for the model's name.

    Raises:
        UserError: the configuration is impossible, or the port is taken.
    """
    own = OmegaConf.masked_copy(cfg, [each.name for each in fields(ServerSettings)])
    settings = ServerSettings(**to_dict(own))
    name = _name(cfg, triple)
    if cfg.playground:
        from proxytune.cli.playground import check_playground

        check_playground(cfg)
    # Bind first: a taken port must fail before models load.
    with _bind(cfg.host, cfg.port) as listener:
        host, port = listener.getsockname()[:2]
        if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
            log.warning("%s: others can reach this server, and it asks for no api_key", host)
        app = _load(cfg, name, triple, settings)
        from proxytune.server.connections import Server  # imports torch

        shown = f"[{host}]" if ":" in host else host
        # The models stay. Without this a body of many small lists lets the collector walk over all
        # objects of torch again and again, which stops the server for seconds.
        gc.collect()
        gc.freeze()
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # a line per write to who has left
        place = f"serving {name} on http://{shown}:{port}/v1  (Ctrl-C ends it)"
        if cfg.playground:
            place = f"playground of {name} on http://{shown}:{port}/  (Ctrl-C ends it)"
        server = Server(app, listener, place)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, server.handle_exit)
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server ends; uvicorn has closed all
            server.serve_forever()


def vllm_command(cfg: DictConfig, triple: str | None) -> str:
    """The line that serves the system of a resolved `ServeConfig` by plain vLLM.

    Args:
        cfg: the configuration.
        triple: as for `serve`.

    Raises:
        UserError: the triple lacks a model, or vLLM does not run it.
    """
    from proxytune.experiment.checks import check_engine, check_engine_specs
    from proxytune.loading.load import check_triple

    settings = replace(engine_settings(cfg), name=VLLM)
    check_engine(cfg, settings)
    from proxytune.vllm.checks import plan_system
    from proxytune.vllm.command import command  # imports vllm, which is there

    asked = _asked(cfg)
    adapted = next((role for role, spec in asked.items() if spec.adapter is not None), None)
    if adapted is not None:
        raise UserError(
            f"{adapted}: plain vLLM takes no adapter of a triple's member; merge it into a whole "
            "model (merge_and_unload), or use `proxytune serve engine=vllm`, which does"
        )
    check_engine_specs(asked, settings)
    check_triple(asked)
    for role, spec in asked.items():
        if spec.format != asked["base"].format:
            log.warning("the %s's chat format is left out: all members read one prompt", role)
    plan = plan_system(asked, settings, cfg.alpha)
    return command(plan, settings, _name(cfg, triple), cfg.host, cfg.port)


def _name(cfg: DictConfig, triple: str | None) -> str:
    """The name that clients use.

    Raises:
        UserError: there is no such system.
    """
    if cfg.system not in SYSTEMS:
        raise UserError(f"unknown system {cfg.system!r}; one of {', '.join(SYSTEMS)}")
    return cfg.model or f"{triple or 'triple'}-{cfg.system}"


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """The system's models: the engine's role -> `ModelSpec`.

    Raises:
        UserError: the triple lacks one.
    """
    from proxytune.config.formulas import key_of, member_of, members_of

    roles = members_of(cfg, cfg.system)
    for member in roles.values():
        node = member_of(cfg, member)
        if node is None or OmegaConf.is_missing(node, "id"):
            raise UserError(
                f"the triple has no {member}; choose a triple (triple=pocket) or give it "
                f"({key_of(member)}.id=...)"
            )
    specs = model_specs(cfg)
    return {role: specs[each] for role, each in roles.items()}


def _load(cfg: DictConfig, name: str, triple: str | None, settings: ServerSettings) -> Any:
    """Loads the system's models; the app that serves them.

    Raises:
        UserError: the triple lacks a model, or the models do not fit.
    """
    import torch

    from proxytune.api import arguments, load
    from proxytune.config.formulas import alphas, formula_of
    from proxytune.experiment.checks import (
        check_engine,
        check_engine_specs,
        check_models,
        check_speed,
    )
    from proxytune.experiment.placement import check_alone
    from proxytune.loading.load import check_triple
    from proxytune.server.app import create_app

    engine = engine_settings(cfg)
    engine.check()
    check_speed(cfg)
    check_alone(cfg)
    check_engine(cfg, engine)
    if cfg.machine.threads:
        torch.set_num_threads(cfg.machine.threads)
    # No warning about a prompt that is too long: the client gets an error.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if cfg.playground:
        return _load_playground(cfg, name, triple, settings)
    asked = _asked(cfg)
    if cfg.engine.name == OWN:
        kind = cfg.triple.vocabulary if len(asked) > 1 else "strict"
        members: dict[str, Any] = check_models(asked, kind)
        how: dict[str, Any] = {"alpha": alphas(cfg), "formula": formula_of(cfg), "vocabulary": kind}
        if len(members) == 1:
            how = {}  # a single model
        generator = load(**arguments(members), **how, cuda_graphs=cfg.machine.cuda_graphs)
    else:
        from proxytune.vllm.pool import load_engine

        check_engine_specs(asked, engine)
        check_triple(asked)
        generator = load_engine(asked, engine, cfg.alpha)
    return create_app(
        {name: generator}, settings, batch_size=cfg.batch_size, speculative=cfg.speculative
    )


def _load_playground(
    cfg: DictConfig, name: str, triple: str | None, settings: ServerSettings
) -> Any:
    """Loads every system of the triple; the app that serves them and the page.

    Raises:
        UserError: the triple lacks one of the proxy's models, or the models do not fit.
    """
    from proxytune.cli.playground import asked_systems, load_systems, playground_of
    from proxytune.experiment.checks import check_models
    from proxytune.server.app import create_app

    _asked(cfg)
    systems = asked_systems(cfg)
    specs = model_specs(cfg)
    used = {member for roles in systems.values() for member in roles.values()}
    kind = cfg.triple.vocabulary
    members = check_models({role: spec for role, spec in specs.items() if role in used}, kind)
    generators = load_systems(cfg, members, systems)
    names = {each: name if each == "proxy" else f"{triple or 'triple'}-{each}" for each in systems}
    # the proxy first: it answers requests that name no model
    served = {names[each]: generators[each] for each in ("proxy", *systems)}
    return create_app(
        served,
        settings,
        batch_size=cfg.batch_size,
        speculative=cfg.speculative,
        playground=playground_of(cfg, triple, names),
    )


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; it does not listen before the models are loaded.

    Raises:
        UserError: there is no such address, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port={port}: a port is a number up to 65535; 0 takes a free one")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror or error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot listen on {host} port {port} ({reason}); choose another with port=... "
            "(0 takes a free one)"
        ) from error
    return listener
