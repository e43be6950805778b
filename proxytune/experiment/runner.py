"""Runs an experiment: generates what its cells lack, scores them, and writes the results.

A cell is one system on one task. A killed run continues where it stopped.

<output_dir>/run.json                        configuration, models, versions, sessions
<output_dir>/<task>/examples.jsonl           the examples that were asked
<output_dir>/<task>/<system>/cell.json       everything that this cell's completions depend on
<output_dir>/<task>/<system>/completions.jsonl, scores.jsonl, judges.json (who judged)
<output_dir>/metrics.jsonl, table.md, table.csv, report.html
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from proxytune import provenance
from proxytune.config.formulas import alphas, formula_of, is_default, member_of, members_of
from proxytune.config.schema import to_dict
from proxytune.config.specs import engine_settings
from proxytune.errors import UserError
from proxytune.experiment.cells import (
    Cell,
    GenerationSettings,
)
from proxytune.experiment.checks import (
    check_before_models,
    check_machine,
    check_writable,
    serve_local,
)
from proxytune.experiment.generate import ModelPool, Pool, generate
from proxytune.experiment.identity import claim, sole_writer
from proxytune.experiment.placement import ray_pool, uses_ray
from proxytune.experiment.planned import DECODING_OVERRIDES, make_cells
from proxytune.experiment.prompts import check_one_prompt, check_prompts
from proxytune.files import read_json, read_jsonl, set_aside, write_json, write_jsonl
from proxytune.hashes import sha256_json
from proxytune.records import Metric
from proxytune.results import paper
from proxytune.results.folder import build_table
from proxytune.results.run_json import RunJson
from proxytune.secrets import redacted
from proxytune.vllm.settings import OWN

log = logging.getLogger(__name__)

_JUDGES = "judges.json"  # beside a cell's scores: the judges that they depend on


def run_experiment(cfg: DictConfig, sweep: Path | None = None) -> list[Metric]:
    """Runs the experiment of a resolved `RunConfig` and returns its metrics.

    Args:
        cfg: the configuration.
        sweep: the folder of a sweep's points, where the run is one of them
            (`experiment.sharing`).

    Raises:
        UserError: the configuration is wrong; no model has been loaded.
        OSError: the results folder cannot be written; everything finished is kept.
    """
    started = time.time()
    tasks, specs = check_before_models(cfg)
    output = Path(cfg.output_dir)  # it may hold cfg.name, which was checked
    check_writable(output)
    if cfg.stage != "score":
        check_machine(cfg)
    with sole_writer(output) if cfg.stage != "score" else nullcontext():
        cells = make_cells(cfg, tasks, output, sweep)
        return _run(cfg, cells, specs, output, started)


def _run(
    cfg: DictConfig, cells: Sequence[Cell], specs: dict[str, Any], output: Path, started: float
) -> list[Metric]:
    if cfg.stage != "score":
        check_prompts(cells, specs)
        if cfg.engine.name != OWN:
            check_one_prompt(cells, specs)
        specs = serve_local(specs)
    for cell in cells:
        claim(cell.folder, cell.identity, cfg.stage)
    if cfg.machine.threads:
        torch.set_num_threads(cfg.machine.threads)
    session = {"started": _now(), "stage": cfg.stage, **provenance.environment()}
    run_json = _begin_run_json(output, cfg, specs, cells, session)
    tracker = _make_tracker(cfg, output)
    try:
        if cfg.stage != "score":
            _generate(cfg, specs, cells, session, partial(_note_begin, output, run_json))
            tracker.log_throughput(session["generation"])
            session |= _copied(cells)
        metrics = []
        if cfg.stage != "generate":
            metrics, unfinished = _score(cells, output)
            _show(cfg, cells, metrics, unfinished, tracker)
        session["finished"], session["seconds"] = _now(), round(time.time() - started, 1)
        write_json(output / "run.json", run_json)
        if cfg.report and cfg.stage != "generate":
            _report(output)
    finally:
        tracker.finish()
    return metrics


def _note_begin(output: Path, run_json: dict[str, Any], cell: Cell, before: int) -> None:
    """Notes in run.json that a cell begins now, for whoever watches the run."""
    began = datetime.now(UTC).isoformat(timespec="milliseconds")
    cells = run_json["sessions"][-1].setdefault("cells", {})
    cells[f"{cell.system}/{cell.task_name}"] = {"began": began, "before": before}
    write_json(output / "run.json", run_json)


def _generate(
    cfg: DictConfig,
    specs: dict[str, Any],
    cells: Sequence[Cell],
    session: dict[str, Any],
    on_begin: Callable[[Cell, int], None],
) -> None:
    """Generates what is missing; notes in the run's session how fast, and who did it."""
    settings = GenerationSettings(
        seed=cfg.decoding.seed,
        batch_size=cfg.decoding.batch_size,
        speculative=cfg.decoding.speculative,
        trace=cfg.decoding.trace,
    )
    systems = list(dict.fromkeys(cell.system for cell in cells))
    ran: list[Any] = []
    try:
        with _pool(cfg, specs, systems, ran) as pool:
            session["generation"] = generate(cells, pool, settings, on_begin)
    finally:
        if ran:
            session["replicas"] = [each.to_dict() for each in ran]


def _copied(cells: Sequence[Cell]) -> dict[str, Any]:
    """For run.json: which cells were copied from other points of a sweep, and how much of them."""
    copied = {f"{cell.system}/{cell.task_name}": cell.copied for cell in cells if cell.copied}
    if not copied:
        return {}
    points = list(dict.fromkeys(point for cell in cells for point in cell.copied))
    systems = list(dict.fromkeys(cell.system for cell in cells if cell.copied))
    log.info("copied from %s: what it has of %s", ", ".join(points), ", ".join(systems))
    return {"copied": copied}


def _pool(
    cfg: DictConfig, specs: dict[str, Any], systems: Sequence[str], ran: list[Any]
) -> AbstractContextManager[Pool]:
    """The configured engine's pool of systems.

    Args:
        cfg: the configuration.
        specs: role of the triple -> what to load.
        systems: those of the run.
        ran: gets what each replica has done, where there are replicas.
    """
    engine = engine_settings(cfg)
    if engine.name == OWN:
        members = {system: members_of(cfg, system) for system in systems}
        make = partial(
            ModelPool,
            specs,
            members,
            alpha=alphas(cfg),
            formula=formula_of(cfg),
            vocabulary=cfg.triple.vocabulary,
            cuda_graphs=cfg.machine.cuda_graphs,
        )
        if cfg.machine.tensor_parallel > 1:
            from proxytune.experiment.ranks import LeadingPool

            return LeadingPool(make)
        if uses_ray(cfg):
            return ray_pool(cfg, specs, members, make, ran)
        return make()
    from proxytune.vllm.pool import EnginePool

    return EnginePool(specs, alpha=cfg.alpha, settings=engine)


def _report(output: Path) -> None:
    """Writes the page. What it shows is stored by now, so a damaged file costs the page alone."""
    from proxytune.results.report import write_report

    try:
        print(f"\nreport: {write_report(output)}")
    except UserError as error:
        log.warning("no report was written: %s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _vocabulary(cfg: DictConfig, specs: dict[str, Any]) -> dict[str, Any]:
    """What the triple's members do not share: end tokens, renamed tokens, whole vocabularies."""
    from proxytune.loading.load import find_vocabulary

    if "proxy" not in cfg.systems:
        return {}
    members = {role: specs[name] for role, name in members_of(cfg, "proxy").items()}
    found = find_vocabulary(members, cfg.triple.vocabulary)
    end = found.end and found.end.to_dict()
    noted = {"end_tokens": end, "vocabulary": found.to_dict()}
    return {name: each for name, each in noted.items() if each is not None}


def _begin_run_json(
    output: Path,
    cfg: DictConfig,
    specs: dict[str, Any],
    cells: Sequence[Cell],
    session: dict[str, Any],
) -> dict[str, Any]:
    path = output / "run.json"
    resolved = redacted(to_dict(cfg))
    run_json: dict[str, Any] = {"sessions": []}
    if path.exists():
        run_json = read_json(path, RunJson, sessions=list, tasks=dict, models=dict)
    datasets = {c.task_name: c.dataset_sha256 for c in cells if c.dataset_sha256}
    others = run_json.get("other_datasets", {}) | {c.task_name: c.other_dataset for c in cells}
    models = {role: member for c in cells for role, member in c.models().items()}
    if cfg.stage == "score":  # this machine may lack the models: keep the recorded facts
        models |= run_json.get("models", {})
    else:
        run_json |= _vocabulary(cfg, specs)
    run_json |= {
        "name": cfg.name,
        "config": resolved,  # of the latest session; the folder may hold other tasks
        "config_sha256": sha256_json(resolved),
        "tasks": run_json.get("tasks", {}) | resolved["task"],
        "datasets": run_json.get("datasets", {}) | datasets,
        "other_datasets": {task: other for task, other in others.items() if other},
        "models": run_json.get("models", {}) | models,
        "seed": cfg.decoding.seed,
    }
    run_json["sessions"].append(session)
    write_json(path, run_json)
    return run_json


def _score(cells: Sequence[Cell], output: Path) -> tuple[list[Metric], dict[str, str]]:
    """Scores every cell, and writes scores and metrics; other cells' metrics are kept.

    Returns:
        The metrics; and for each task that lacks completions, how many its systems have
        ("base 3 of 5, proxy 2 of 5").

    Raises:
        UserError: no example has all its completions.
    """
    metrics: list[Metric] = []
    lacking: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        found = cell.score()
        write_jsonl(cell.folder / "scores.jsonl", found.scores)
        if judges := cell.judged_by():
            write_json(cell.folder / _JUDGES, judges)
        metrics += found.metrics
        if found.unfinished:
            lacking[cell.task_name].append(f"{cell.system} {found.unfinished}")
    if not metrics:
        raise UserError(
            f"no example in {output} has all its completions yet; run with stage=all to go on"
        )
    ours = {(cell.task_name, cell.system) for cell in cells}
    path = output / "metrics.jsonl"
    try:
        others = [m for m in read_jsonl(path, Metric) if (m.task, m.system) not in ours]
    except UserError as error:
        set_aside(path, error)
        others = []
    odd = _judged_otherwise(cells, {(m.task, m.system) for m in others}, output)
    write_jsonl(path, [*metrics, *(m for m in others if (m.task, m.system) not in odd)])
    return metrics, {task: ", ".join(systems) for task, systems in lacking.items()}


def _judged_otherwise(
    cells: Sequence[Cell], others: set[tuple[str, str]], output: Path
) -> set[tuple[str, str]]:
    """The (task, system) pairs of `others` that another judge scored: no table may compare them."""
    judges = {cell.task_name: cell.judged_by() for cell in cells}
    odd = set()
    for task, system in sorted(others):
        path = output / task / system / _JUDGES
        known = read_json(path) if path.is_file() else None
        if judges.get(task) and known != judges[task]:
            odd.add((task, system))
            log.warning(
                "%s/%s was scored by another judge and is left out; score it again (stage=score)",
                task,
                system,
            )
    return odd


def _show(
    cfg: DictConfig,
    cells: Sequence[Cell],
    metrics: list[Metric],
    unfinished: dict[str, str],
    tracker: Any,
) -> None:
    """Writes the comparison table, prints it, and sends everything to the tracker."""
    from rich.console import Console

    from proxytune.experiment.tracking import sample_completions
    from proxytune.results import tables

    infos = {cell.task_name: cell.infos for cell in cells}
    output = Path(cfg.output_dir)
    others = {cell.task_name: cell.other_dataset for cell in cells}
    table = build_table(output, metrics, infos, paper_place(cfg), cfg.limit, unfinished, others)
    Console().print(tables.to_rich(table, cfg.name))
    tracker.log_metrics(metrics)
    tracker.log_table(table)
    tracker.log_completions(lambda: sample_completions(output, list(infos)))


def paper_place(cfg: DictConfig) -> tuple[str, str] | None:
    """The table and model size whose printed numbers to show beside ours.

    None where nobody has printed numbers for this setting: other models, alpha or decoding.
    """
    if not cfg.paper:
        return None
    settings = {f"decoding.{key}": cfg.decoding[key] for key in DECODING_OVERRIDES}
    other = [f"{key}={value}" for key, value in settings.items() if value is not None]
    other += [f"alpha={cfg.alpha:g}"] if cfg.alpha != 1 else []
    other += [] if is_default(cfg) else [f"formula={cfg.formula._target_}"]
    other += [f"pairs={','.join(cfg.triple.pairs)}"] if cfg.triple.pairs else []
    for system, theirs in paper.models_of(cfg.paper.table, cfg.paper.size).items():
        # The proxy's numbers, too, are of one base.
        model = member_of(cfg, system) if system in (*cfg.systems, "base") else None
        ours = str(model.adapter or model.id) if model else theirs
        if not paper.same_model(ours, theirs):
            other.append(f"the {system} {ours} in the place of {theirs}")
    if other:
        log.info("the printed numbers are left out: there are none for %s", ", ".join(other))
        return None
    return cfg.paper.table, cfg.paper.size


def _make_tracker(cfg: DictConfig, output: Path) -> Any:
    from proxytune.experiment.tracking import make_tracker

    settings = cfg.tracking
    return make_tracker(
        kind=settings.kind,
        project=settings.project,
        entity=settings.entity,
        experiment=cfg.name,
        mode=settings.mode,
        config=redacted(to_dict(cfg)),
        directory=output,
    )
