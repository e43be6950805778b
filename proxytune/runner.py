"""Systems x tasks: generate what is missing, score, save. A killed run goes on where it stopped.

<output_dir>/run.json                        provenance
<output_dir>/<task>/examples.jsonl           what was asked
<output_dir>/<task>/<system>/cell.json       what this cell's completions depend on
<output_dir>/<task>/<system>/completions.jsonl, scores.jsonl, judges.json (who judged)
<output_dir>/metrics.jsonl, table.md, table.csv, report.html
"""

import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from proxytune import paper, provenance
from proxytune.cells import (
    DECODING_OVERRIDES,
    MEMBERS,
    Cell,
    HarnessCell,
    claim,
    make_cells,
    models_of,
    sole_writer,
)
from proxytune.checks import check_before_models, check_machine, check_writable, model_specs
from proxytune.config import to_dict
from proxytune.progress import GenerationProgress, generation_progress
from proxytune.records import Completion, JsonlWriter, Metric, read_jsonl, write_jsonl

log = logging.getLogger(__name__)

_JUDGES = "judges.json"  # beside a cell's scores: who made them


def run_experiment(cfg: DictConfig) -> list[Metric]:
    """Runs the experiment of a resolved `RunConfig` and returns its metrics.

    Raises:
        ValueError: the configuration asks for something that cannot be; nothing was loaded.
        OSError: the results folder cannot be written; everything finished is kept.
    """
    started = time.time()
    tasks = check_before_models(cfg)
    output = Path(cfg.output_dir)  # contains the experiment's name, which is checked by now
    check_writable(output)
    if cfg.stage != "score":
        check_machine(cfg)
    with sole_writer(output) if cfg.stage != "score" else nullcontext():
        return _run(cfg, tasks, output, started)


def _run(cfg: DictConfig, tasks: dict[str, Any], output: Path, started: float) -> list[Metric]:
    cells = make_cells(cfg, tasks, output)
    for cell in cells:
        claim(cell, cfg.stage)
    if cfg.machine.threads:
        torch.set_num_threads(cfg.machine.threads)
    session = {"started": _now(), "stage": cfg.stage, **provenance.environment()}
    run_json = _begin_run_json(output, cfg, cells, session)
    tracker = _make_tracker(cfg, output)
    try:
        if cfg.stage != "score":
            session["generation"] = _generate(cfg, cells)
            tracker.log_throughput(session["generation"])
        metrics = []
        if cfg.stage != "generate":
            metrics, unfinished = _score(cells, output)
            _show(cfg, cells, metrics, unfinished, tracker)
        session["finished"], session["seconds"] = _now(), round(time.time() - started, 1)
        provenance.write_json(output / "run.json", run_json)
        if cfg.report and cfg.stage != "generate":
            from proxytune.report import write_report

            path = write_report(output)
            print(f"\nreport: {path}")
    finally:
        tracker.finish()
    return metrics


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _begin_run_json(
    output: Path, cfg: DictConfig, cells: Sequence[Cell | HarnessCell], session: dict[str, Any]
) -> dict[str, Any]:
    path = output / "run.json"
    resolved = to_dict(cfg)
    run_json: dict[str, Any] = {"sessions": []}
    if path.exists():
        run_json = json.loads(path.read_text())
    datasets = {c.task_name: c.identity["dataset"]["sha256"] for c in cells if isinstance(c, Cell)}
    models = {role: member for c in cells for role, member in models_of(c).items()}
    if cfg.stage == "score":  # which may be done where the models are not
        models |= run_json.get("models", {})
    run_json |= {
        "name": cfg.name,
        "config": resolved,  # of the latest session; the folder may hold further tasks and systems
        "config_sha256": provenance.sha256_json(resolved),
        "tasks": run_json.get("tasks", {}) | resolved["task"],
        "datasets": run_json.get("datasets", {}) | datasets,
        "models": run_json.get("models", {}) | models,
        "seed": cfg.decoding.seed,
    }
    run_json["sessions"].append(session)
    provenance.write_json(path, run_json)
    return run_json


# -- generation --------------------


def _generate(cfg: DictConfig, cells: Sequence[Cell | HarnessCell]) -> dict[str, Any]:
    """Generates what is missing; returns system/task -> tokens and seconds of this session."""
    throughput: dict[str, Any] = {}
    by_system: dict[str, list[Cell | HarnessCell]] = defaultdict(list)
    for cell in cells:
        by_system[cell.system].append(cell)
    pool = _Pool(cfg)
    with generation_progress([(c.system, c.task_name, c.total) for c in cells]) as progress:
        for position, (system, group) in enumerate(by_system.items()):
            todo = []
            for cell in group:
                missing = len(cell.missing())
                progress.done(cell.system, cell.task_name, cell.total - missing)
                todo += [cell] if missing else []
            if not todo:
                continue
            later = list(by_system)[position + 1 :]
            generator = pool.open(system, keep_for=later)
            for cell in todo:
                if isinstance(cell, HarnessCell):
                    _run_harness(cfg, cell, generator, progress)
                else:
                    key = f"{cell.system}/{cell.task_name}"
                    throughput[key] = _generate_cell(cfg, cell, generator, pool, progress)
    pool.close()
    return throughput


def _generate_cell(
    cfg: DictConfig,
    cell: Cell,
    generator: Any,
    pool: "_Pool",
    progress: GenerationProgress,
) -> dict[str, float]:
    from proxytune.prompting import encode, render

    stored, missing = cell.completions(), cell.missing()
    prompts, hashes = [], []
    for example in missing:
        rendered = {
            role: render(example.prompt, pool.specs[name].format, pool.tokenizer(name))
            for role, name in MEMBERS[cell.system].items()
        }
        prompts.append(
            {r: encode(p, pool.tokenizer(MEMBERS[cell.system][r])) for r, p in rendered.items()}
        )
        hashes.append({r: provenance.sha256_text(p.text) for r, p in rendered.items()})
    base: Any = generator.members["base"].member
    if hasattr(base, "estimate"):
        lengths = [len(prompt["base"]) for prompt in prompts]
        lockstep = cfg.decoding.speculative is False or cfg.decoding.trace
        drafted = cell.system == "proxy" and not lockstep
        estimate = base.estimate(lengths, cell.decoding, drafted)
        log.info("%s, %s: %s", cell.task_name, cell.system, estimate)
    tokens = 0
    unfinished = [cell.decoding.n] * len(missing)
    start = time.perf_counter()
    with JsonlWriter(cell.completions_path) as writer:

        def store(generation: Any) -> None:
            nonlocal tokens
            example = missing[generation.prompt_index]
            tokens += len(generation.token_ids)
            unfinished[generation.prompt_index] -= 1
            if generation.sample not in stored.get(example.id, ()):
                writer.write(
                    Completion(
                        example_id=example.id,
                        sample=generation.sample,
                        text=generation.text,
                        raw_text=generation.raw_text,
                        token_ids=list(generation.token_ids),
                        finish_reason=generation.finish_reason,
                        prompt_sha256=hashes[generation.prompt_index],
                        extra=generation.extra,
                    )
                )
            progress.tokens(cell.system, cell.task_name, len(generation.token_ids))
            if unfinished[generation.prompt_index] == 0:
                progress.advance(cell.system, cell.task_name)

        generator.generate(
            prompts,
            **dataclasses.asdict(cell.decoding),
            seed=cfg.decoding.seed,
            sample_keys=[e.id for e in missing],
            speculative=cfg.decoding.speculative,
            batch_size=cfg.decoding.batch_size,
            record=cfg.decoding.trace and cell.system == "proxy",
            on_finish=store,
        )
    if hasattr(base, "spending"):
        log.info("%s, %s: %s", cell.task_name, cell.system, base.spending())
    return {"tokens": tokens, "seconds": round(time.perf_counter() - start, 2)}


def _run_harness(
    cfg: DictConfig, cell: HarnessCell, generator: Any, progress: GenerationProgress
) -> None:
    cell.task.run(
        generator,
        cell.folder,
        cell.system,
        limit=cfg.limit,
        seed=cfg.decoding.seed,
        batch_size=cfg.decoding.batch_size,
    )
    progress.tokens(cell.system, cell.task_name, 0)
    progress.advance(cell.system, cell.task_name)


class _Pool:
    """Loads each model once, keeps it while a later system needs it, and frees it then."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.specs = model_specs(cfg)
        self._models: dict[str, Any] = {}

    def open(self, system: str, keep_for: Sequence[str]) -> Any:
        """A generator of this system; models that only earlier systems used are freed."""
        from proxytune.api import load
        from proxytune.model import load_member, shares_weights

        names = set(MEMBERS[system].values())
        wanted = names | {name for later in keep_for for name in MEMBERS[later].values()}
        for name in [n for n in self._models if n not in wanted]:
            self._free(name)
        if system == "proxy" and shares_weights(self.specs["expert"], self.specs["antiexpert"]):
            # one copy of the weights carries both, so an earlier system's copies must go
            for name in {"expert", "antiexpert"} & self._models.keys():
                self._free(name)
        for name in ("antiexpert", "expert", "base", "tuned"):
            if name in names and name not in self._models:
                share = self._models.get("antiexpert") if system == "proxy" else None
                self._models[name] = load_member(self.specs[name], share=share)
        members = {role: self._models[name] for role, name in MEMBERS[system].items()}
        graphs = self.cfg.machine.cuda_graphs
        return load(**members, alpha=self.cfg.alpha, cuda_graphs=graphs)

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a loaded member."""
        return self._models[name].tokenizer

    def _free(self, name: str) -> None:
        del self._models[name]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Frees every model, so that judges find the memory empty."""
        for name in list(self._models):
            self._free(name)


# -- scoring --------------------


def _score(
    cells: Sequence[Cell | HarnessCell], output: Path
) -> tuple[list[Metric], dict[str, str]]:
    """Writes every cell's scores, and the metrics; those of the folder's other cells are kept.

    Returns:
        The metrics, and of the tasks that lack completions: which systems have how many.

    Raises:
        ValueError: nothing has been generated that could be scored.
    """
    metrics: list[Metric] = []
    lacking: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        found, scores = cell.score()
        write_jsonl(cell.folder / "scores.jsonl", scores)
        if isinstance(cell, Cell) and (judges := cell.task.judged_by()):
            provenance.write_json(cell.folder / _JUDGES, judges)
        metrics += found
        if isinstance(cell, Cell) and len(scores) < cell.total:
            lacking[cell.task_name].append(f"{cell.system} {len(scores)} of {cell.total}")
    if not metrics:
        raise ValueError(
            f"no example in {output} has all its completions yet; run with stage=all to go on"
        )
    ours = {(cell.task_name, cell.system) for cell in cells}
    path = output / "metrics.jsonl"
    others = [m for m in read_jsonl(path, Metric) if (m.task, m.system) not in ours]
    odd = _judged_otherwise(cells, {(m.task, m.system) for m in others}, output)
    write_jsonl(path, [*metrics, *(m for m in others if (m.task, m.system) not in odd)])
    return metrics, {task: ", ".join(systems) for task, systems in lacking.items()}


def _judged_otherwise(
    cells: Sequence[Cell | HarnessCell], others: set[tuple[str, str]], output: Path
) -> set[tuple[str, str]]:
    """Which other systems of these tasks had another judge: no table may compare them."""
    judges = {cell.task_name: cell.task.judged_by() for cell in cells if isinstance(cell, Cell)}
    odd = set()
    for task, system in sorted(others):
        path = output / task / system / _JUDGES
        known = json.loads(path.read_text()) if path.is_file() else None
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
    cells: Sequence[Cell | HarnessCell],
    metrics: list[Metric],
    unfinished: dict[str, str],
    tracker: Any,
) -> None:
    """Writes the comparison table, prints it, and hands everything to the tracker."""
    from rich.console import Console

    from proxytune import tables
    from proxytune.tracking import sample_completions

    infos = {cell.task_name: cell.infos for cell in cells}
    output = Path(cfg.output_dir)
    table = tables.build(output, metrics, infos, paper_place(cfg), cfg.limit, unfinished)
    Console().print(tables.to_rich(table, cfg.name))
    tracker.log_metrics(metrics)
    tracker.log_table(table)
    tracker.log_completions(sample_completions(output, list(infos)))


def paper_place(cfg: DictConfig) -> tuple[str, str] | None:
    """Table and size of the paper's cells beside ours; None where the paper ran something else."""
    if not cfg.paper:
        return None
    settings = {f"decoding.{key}": cfg.decoding[key] for key in DECODING_OVERRIDES}
    other = [f"{key}={value}" for key, value in settings.items() if value is not None]
    other += [f"alpha={cfg.alpha:g}"] if cfg.alpha != 1 else []
    base = cfg.triple.base.id
    theirs = paper.other_base(cfg.paper.size, base)
    other += [f"the base {base} in the place of {theirs}"] if theirs else []
    if other:
        log.info("the paper's numbers are left out: it has none for %s", ", ".join(other))
        return None
    return cfg.paper.table, cfg.paper.size


def _make_tracker(cfg: DictConfig, output: Path) -> Any:
    from proxytune.tracking import make_tracker

    settings = cfg.tracking
    return make_tracker(
        kind=settings.kind,
        project=settings.project,
        entity=settings.entity,
        experiment=cfg.name,
        mode=settings.mode,
        config=to_dict(cfg),
        directory=output,
    )
