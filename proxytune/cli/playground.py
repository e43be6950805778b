"""What the playground shows of a triple: its systems, loaded once, and prompts of its tasks."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from proxytune.config.formulas import alphas, formula_of, members_of
from proxytune.config.specs import model_specs
from proxytune.errors import UserError
from proxytune.experiment.generate import ModelPool
from proxytune.files import shipped
from proxytune.generator import Generator
from proxytune.records import Prompt
from proxytune.roles import COMPARED
from proxytune.server.playground import Playground, Suggestion
from proxytune.vllm.settings import OWN

log = logging.getLogger(__name__)

_EACH = 3  # prompts per task
_LONGEST = 256  # tokens of a suggested answer
_SHOWN = 60  # characters of a prompt in the list


def check_playground(cfg: DictConfig) -> None:
    """Refuses settings with which the page could not work.

    Raises:
        UserError: names the setting.
    """
    if cfg.system != "proxy":
        raise UserError(f"playground=true shows every system; leave system={cfg.system} out")
    if cfg.chat_only:
        raise UserError("playground=true asks /v1/completions, too; leave chat_only=true out")
    if cfg.engine.name != OWN:
        raise UserError(f"playground=true runs on engine=own, not on engine={cfg.engine.name}")


def asked_systems(cfg: DictConfig) -> dict[str, dict[str, str]]:
    """System -> the engine's role -> the triple's name, for all whose models the triple has."""
    specs = model_specs(cfg)
    members = {system: members_of(cfg, system) for system in COMPARED}
    return {system: roles for system, roles in members.items() if {*roles.values()} <= {*specs}}


def load_systems(
    cfg: DictConfig, specs: Mapping[str, Any], systems: Mapping[str, Mapping[str, str]]
) -> dict[str, Generator]:
    """Loads the systems; a model that several need is loaded once.

    Args:
        cfg: a resolved `ServeConfig`.
        specs: name in the triple -> `ModelSpec`.
        systems: see `asked_systems`; with the proxy.
    """
    order = ["proxy", *(system for system in systems if system != "proxy")]
    pool = ModelPool(
        dict(specs),
        {system: systems[system] for system in order},
        alpha=alphas(cfg),
        formula=formula_of(cfg),
        vocabulary=cfg.triple.vocabulary,
        cuda_graphs=cfg.machine.cuda_graphs,
    )
    with pool:
        opened = {system: pool.open(system) for system in order}
    return {system: opened[system] for system in systems}


def playground_of(cfg: DictConfig, triple: str | None, names: Mapping[str, str]) -> Playground:
    """What the page is told.

    Args:
        cfg: a resolved `ServeConfig`.
        triple: the chosen file of conf/triple.
        names: system -> the name that clients use.
    """
    specs = model_specs(cfg)
    models = ", ".join(f"{role}: {Path(spec.id).name}" for role, spec in specs.items())
    return Playground(
        about=f"{triple or 'triple'} ({models}).",
        systems=dict(names),
        suggestions=list(_suggestions(triple, cfg.root)),
    )


def _suggestions(triple: str | None, root: str) -> Iterator[Suggestion]:
    """Prompts of the tasks of the first experiment with this triple.

    Tasks whose data are not on this machine have none: a page must not wait for a hub.
    """
    for name in _tasks_of(triple):
        file = OmegaConf.load(shipped("conf") / "task" / f"{name}.yaml")
        merged: Any = OmegaConf.merge({"root": root}, file)
        settings = merged[name]
        path = settings.get("path")
        if not path or not Path(path).exists():
            continue
        try:
            task = instantiate(settings, _convert_="all")
            examples = task.examples()[:_EACH]
        except UserError as error:
            log.warning("no examples of %s: %s", name, error)
            continue
        for number, example in enumerate(examples, start=1):
            yield _suggestion(f"{name} {number}", example.prompt, task.decoding)


def _suggestion(label: str, prompt: Prompt, decoding: Any) -> Suggestion:
    text = prompt.raw if prompt.plain else prompt.user
    last = (text.strip().splitlines() or [""])[-1].strip()  # instructions come before it
    shown = last if len(last) <= _SHOWN else last[: _SHOWN - 1] + "…"
    return Suggestion(
        label=f"{label}: {shown}",
        form="text" if prompt.plain else "chat",
        prompt=text,
        prefix="" if prompt.plain else prompt.response_prefix,
        system=None if prompt.plain else prompt.system,
        max_tokens=min(decoding.max_new_tokens, _LONGEST),
        stop=list(decoding.stop),
    )


def _tasks_of(triple: str | None) -> list[str]:
    """The tasks of the first file of conf/experiment that has this triple."""
    for path in sorted((shipped("conf") / "experiment").glob("*.yaml")):
        chosen: dict[str, Any] = {}
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        for each in (content or {}).get("defaults", []):
            chosen |= each if isinstance(each, dict) else {}
        if triple is not None and chosen.get("override /triple") == triple:
            tasks = chosen.get("override /task") or []
            return tasks if isinstance(tasks, list) else [tasks]
    return []
