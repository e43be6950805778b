"""Refusals: everything about a run that can be known before a model is loaded."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from proxytune.config.formulas import (
    alphas,
    formula_of,
    is_default,
    key_of,
    member_of,
    members_of,
    pair_roles,
)
from proxytune.config.specs import engine_settings
from proxytune.engine.penalties import NO_RAW_LOGITS
from proxytune.errors import UserError, did_you_mean, need
from proxytune.experiment.given_tasks import make_task
from proxytune.experiment.placement import check_placement
from proxytune.experiment.planned import decoding_of
from proxytune.experiment.thoughts import check_thoughts
from proxytune.files import check_name, check_output_dir, check_plain_files, replace_file
from proxytune.members.api.settings import LOCAL
from proxytune.records import is_plain
from proxytune.roles import ROLES, SYSTEMS
from proxytune.vllm.settings import OWN, EngineSettings

log = logging.getLogger(__name__)

STAGES = ("all", "generate", "score")


def check_before_models(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refuses what can be known to fail without loading a model.

    Returns:
        The tasks by name, and role -> `ModelSpec`; see `serve_local` for a base that is "local".

    Raises:
        UserError: a bad setting, an unknown task key, a judge without its key, a model that is
            not there or may not be read, a triple without one vocabulary.
    """
    check_config(cfg)
    engine = engine_settings(cfg)
    engine.check()
    if cfg.stage != "score":
        check_engine(cfg, engine)
        check_placement(cfg, _members_in_use(cfg))
    if cfg.tracking.kind == "wandb":
        need("wandb", "track", "tracking=wandb")
    if cfg.stage != "score" and cfg.machine.cuda_graphs and not torch.cuda.is_available():
        raise UserError("machine.cuda_graphs=true needs a GPU, and none was found")
    tasks = {name: make_task(name, node) for name, node in cfg.task.items()}
    _check_names(tasks)
    _check_decoding(cfg, tasks, engine)
    for task in tasks.values():
        # generating needs no judge and runs no program; another harness needs its data for it
        if cfg.stage != "generate" or task.runs_itself:
            task.check()
    if cfg.stage == "score":
        return tasks, {}
    from proxytune.loading.load import check_endpoints

    specs = _specs_in_use(cfg)
    check_engine_specs(specs, engine)
    elsewhere = cfg.machine.ray_address is not None  # its machines may have other devices
    here = {role: replace(spec, device=None) for role, spec in specs.items()}
    vocab_size = _check_vocabularies(cfg, here if elsewhere else specs)
    check_engine_systems(cfg, specs, engine)
    check_thoughts(cfg, specs, tasks)
    _check_formula(cfg, specs, vocab_size)
    check_endpoints({role: spec for role, spec in specs.items() if not _is_local(spec)})
    return tasks, specs


def _check_vocabularies(cfg: DictConfig, specs: Mapping[str, Any]) -> int:
    """Refuses models that cannot be combined; the length of the vocabulary.

    Under another kind of vocabulary than the strict one, what decodes alone shares none.
    """
    from proxytune.loading.load import check_triple

    kind = cfg.triple.vocabulary
    if kind == "strict" or "proxy" not in cfg.systems:
        return check_triple(specs)
    names = set(members_of(cfg, "proxy").values())
    for name, spec in specs.items():
        if name not in names:
            check_triple({name: spec})
    return check_triple({name: spec for name, spec in specs.items() if name in names}, kind)


def _check_formula(cfg: DictConfig, specs: Mapping[str, Any], vocab_size: int) -> None:
    """Tries the formula out on random logits, and refuses one that its base cannot serve."""
    if (is_default(cfg) and not cfg.triple.pairs) or "proxy" not in cfg.systems:
        return
    from proxytune.formula import guidance
    from proxytune.loading.formulas import lists_few, settle
    from proxytune.loading.load import check_guidance

    formula = formula_of(cfg)
    members = {role: specs[name] for role, name in members_of(cfg, "proxy").items()}
    check_guidance(formula, members)
    if formula is guidance and members["base"].format == members["antiexpert"].format:
        raise UserError(
            "formula=guidance: base and antiexpert read the same prompt, so nothing is added; "
            "give the antiexpert another format (triple.antiexpert.format.kind=chat)"
        )
    helpers = [role for role in members if role != "base"]
    few = lists_few(specs)
    settle(
        formula,
        alphas(cfg),
        helpers,
        few=few,
        vocab_size=vocab_size,
        vocabulary=cfg.triple.vocabulary,
    )


def check_engine(cfg: DictConfig, engine: EngineSettings) -> None:
    """Refuses what an engine other than ours cannot do, whatever the models are.

    Args:
        cfg: a resolved `RunConfig` or `ServeConfig`.
        engine: its engine.

    Raises:
        UserError: vLLM is missing or was not tried; a setting is one of the own engine.
    """
    if engine.name == OWN:
        return
    from proxytune.vllm.checks import check_settings

    check_settings(engine)
    if not is_default(cfg):
        raise UserError(f"formula={cfg.formula._target_}: engine=vllm runs formula=proxy alone")
    if cfg.triple.pairs:
        raise UserError(
            f"triple.pairs: engine=vllm runs one pair, not {', '.join(cfg.triple.pairs)}; use "
            "engine=own"
        )
    if cfg.triple.vocabulary != "strict":
        raise UserError(
            f"triple.vocabulary={cfg.triple.vocabulary}: engine=vllm runs vocabulary=strict alone; "
            "use engine=own"
        )
    if cfg.machine.cuda_graphs:
        raise UserError("machine.cuda_graphs is a setting of engine=own; leave it out")
    speculative = cfg.decoding.speculative if "decoding" in cfg else cfg.speculative
    if speculative != "auto" and speculative is not False:
        raise UserError(
            f"speculative={speculative} is a setting of engine=own; with vLLM, say "
            "engine.speculative=draft_model (or ngram)"
        )
    if "decoding" in cfg and cfg.decoding.trace:
        raise UserError(
            "decoding.trace=true: vLLM shows no member's probabilities; decoding=default records "
            "no trace"
        )


def check_engine_specs(specs: Mapping[str, Any], engine: EngineSettings) -> None:
    """Refuses models that another engine does not run; see `vllm.checks.check_specs`."""
    if engine.name == OWN:
        return
    from proxytune.vllm.checks import check_specs

    check_specs(specs, engine)


def check_engine_systems(cfg: DictConfig, specs: Mapping[str, Any], engine: EngineSettings) -> None:
    """Refuses systems that another engine does not run; see `vllm.checks.plan_system`."""
    if engine.name == OWN:
        return
    from proxytune.vllm.checks import plan_system

    for system in cfg.systems:
        members = members_of(cfg, system)
        plan_system({role: specs[name] for role, name in members.items()}, engine)


def check_config(cfg: DictConfig) -> None:
    """Refuses settings that are wrong whatever the models and the data are.

    Raises:
        UserError: the message names the first of them.
    """
    unknown = [s for s in cfg.systems if s not in SYSTEMS]
    if unknown or not cfg.systems:
        wrong = f"unknown system {unknown}" if unknown else "no system chosen"
        raise UserError(f"{wrong}; systems are any of {', '.join(SYSTEMS)}")
    if cfg.stage not in STAGES:
        raise UserError(f"stage={cfg.stage} is none of {', '.join(STAGES)}")
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"limit={cfg.limit}: it must be at least 1, or null for every example")
    if not math.isfinite(cfg.alpha):
        raise UserError(f"alpha={cfg.alpha}: it must be a finite number")
    check_speed(cfg.decoding, "decoding.")
    if not cfg.task:
        raise UserError("no task chosen; give one or several: task=[gsm8k,triviaqa]")
    if OmegaConf.is_missing(cfg, "name") or not cfg.name:
        raise UserError("the experiment has no name; give one: name=my_triple")
    check_name("name", cfg.name)
    for task in cfg.task:
        check_name("task", str(task))
    check_output_dir(str(cfg.output_dir))
    lacking = [role for role in _members_in_use(cfg) if _is_lacking(cfg, role)]
    if lacking:
        role = lacking[0]
        others = [s for s in cfg.systems if not set(members_of(cfg, s).values()) & set(lacking)]
        chosen = f", or leave out what needs it: systems=[{','.join(others)}]" if others else ""
        whole = [r for r in pair_roles(cfg) if r not in lacking]
        meant = did_you_mean(role, whole)
        raise UserError(
            f"the triple has no {role}{meant}; give one ({key_of(role)}.id=...){chosen}"
        )
    # a setting of a part that may be left out, without what the part is about
    members = {role: member_of(cfg, role) for role in (*ROLES, *pair_roles(cfg))}
    parts = {f"{key_of(role)}.api": each.api for role, each in members.items() if each}
    for name, part in (parts | {"paper": cfg.paper}).items():
        for key in ("table", "size") if name == "paper" else ("base_url", "model"):
            if part is not None and OmegaConf.is_missing(part, key):
                raise UserError(
                    f"{name} has no {key}; give {name}.{key}=..., or leave all of it out "
                    f"({name}=null)"
                )
    if cfg.paper:
        from proxytune.results.paper import check_place

        check_place(cfg.paper.table, cfg.paper.size)


def check_speed(settings: DictConfig, where: str = "") -> None:
    """Refuses impossible settings of how fast tokens are chosen.

    Args:
        settings: with `batch_size` and `speculative`.
        where: what a message writes before their names: "decoding." or nothing.

    Raises:
        UserError: names the setting.
    """
    size, drafts = settings.batch_size, settings.speculative
    if size != "auto" and not _is_count(size):
        raise UserError(f"{where}batch_size={size}: it must be at least 1, or auto")
    if drafts != "auto" and not isinstance(drafts, bool) and not _is_count(drafts):
        raise UserError(
            f"{where}speculative={drafts}: it must be auto, false, or a number of drafted tokens"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_lacking(cfg: DictConfig, role: str) -> bool:
    """Whether the triple names no model of this role."""
    member = member_of(cfg, role)
    return member is None or OmegaConf.is_missing(member, "id")


def _check_names(tasks: Mapping[str, Any]) -> None:
    """Refuses names that could not stand in the run's tables; see `records.Metric`."""
    for name, task in tasks.items():
        metrics = getattr(task, "metrics", {})  # a task that runs itself learns them later
        for each in (name, *metrics, *(info.label for info in metrics.values())):
            if not is_plain(each):
                raise UserError(f"task {name}: {each!r} is no name for a table; rename it")


def _check_decoding(cfg: DictConfig, tasks: Mapping[str, Any], engine: EngineSettings) -> None:
    """Refuses impossible settings of decoding, and penalties that the base cannot be given."""
    used = (member_of(cfg, role) for role in _members_in_use(cfg))
    behind_api = any(member is not None and member.api is not None for member in used)
    for name, task in tasks.items():
        if task.runs_itself:  # lm-eval's tasks set their own
            continue
        try:
            decoding = decoding_of(cfg, task)
        except UserError as error:
            raise UserError(f"task {name}: {error}") from None
        if engine.name != OWN:
            from proxytune.vllm.checks import check_decoding

            check_decoding(f"task {name}", decoding, engine)
        if behind_api and decoding.repetition_penalty != 1:
            raise UserError(f"task {name}: {NO_RAW_LOGITS}")


def check_writable(folder: Path) -> None:
    """Makes the results folder and writes to it once.

    Raises:
        UserError: it cannot be made, or has a link in it.
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        message = f"output_dir={folder} cannot be made ({error.strerror}); choose another folder"
        raise UserError(message) from error
    check_plain_files(folder)
    probe = folder / ".writable"
    replace_file(probe, b"a full disk is found out now rather than after the first batch\n")
    probe.unlink()


def check_machine(cfg: DictConfig) -> None:
    """Says what the experiment needs, by estimate, and looks for a GPU where it needs one.

    Raises:
        UserError: there is none, and the user did not choose the CPU.
    """
    need = cfg.needs.gpu_memory_gb
    if not need:
        return
    log.info(
        "estimated needs: %g GB of GPU memory, %g GB of downloads, %g A100 hours",
        need,
        cfg.needs.disk_gb,
        cfg.needs.gpu_hours,
    )
    elsewhere = cfg.machine.ray_address is not None
    if cfg.machine.device == "auto" and not elsewhere and not torch.cuda.is_available():
        raise UserError(
            f"experiment {cfg.name} needs about {need:g} GB of GPU memory and no GPU was found; "
            "run it on a GPU machine, or say machine=cpu to run it here all the same"
        )


def check_models(specs: Mapping[str, Any], vocabulary: str = "strict") -> dict[str, Any]:
    """Refuses models that cannot be combined or asked; serves a base whose URL is "local".

    Args:
        specs: role -> `ModelSpec`.
        vocabulary: see `proxytune.load`.

    Returns:
        The same, with the URLs of the local servers.

    Raises:
        UserError: see `check_triple` and `check_endpoints`.
    """
    from proxytune.loading.load import check_endpoints, check_triple

    check_triple(specs, vocabulary)
    check_endpoints({role: spec for role, spec in specs.items() if not _is_local(spec)})
    return serve_local(specs)


def serve_local(specs: Mapping[str, Any]) -> dict[str, Any]:
    """Serves the bases whose URL is "local". It loads them: after every refusal that costs nothing.

    Args:
        specs: role -> `ModelSpec`.

    Returns:
        The same, with the URLs of the servers.

    Raises:
        UserError: see `check_endpoints`.
    """
    local = {role: spec for role, spec in specs.items() if _is_local(spec)}
    if not local:
        return dict(specs)
    from proxytune.loading.load import check_endpoints
    from proxytune.server.local import with_local_bases

    ready = with_local_bases(local)
    check_endpoints(ready)
    return dict(specs) | ready


def _is_local(spec: Any) -> bool:
    return spec.api is not None and spec.api.base_url == LOCAL


def _specs_in_use(cfg: DictConfig) -> dict[str, Any]:
    from proxytune.config.specs import model_specs

    used = _members_in_use(cfg)
    return {role: spec for role, spec in model_specs(cfg).items() if role in used}


def _members_in_use(cfg: DictConfig) -> list[str]:
    """The members of the triple that the run's systems consist of, each once."""
    members = (role for system in cfg.systems for role in members_of(cfg, system).values())
    return list(dict.fromkeys(members))
