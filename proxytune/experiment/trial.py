"""`proxytune check`: a triple is tried on a few examples of a task. Does it help?

The base, the expert and the antiexpert answer them, and the triple at several alphas. All systems
are compared on the same examples. A killed check goes on where it stopped.

<output_dir>/<task>/<system>/        of the single models, as in the folder of a run
<output_dir>/<task>/proxy/alpha=<a>/ of the triple
<output_dir>/check.json              every figure
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from proxytune import provenance
from proxytune.config.formulas import formula_of, is_default, members_of
from proxytune.config.schema import RunConfig, to_dict
from proxytune.config.specs import engine_settings
from proxytune.errors import UserError
from proxytune.experiment import costs
from proxytune.experiment.cells import Cell, GenerationSettings, TaskCell
from proxytune.experiment.checks import check_before_models, check_writable, serve_local
from proxytune.experiment.completions import read_completions
from proxytune.experiment.generate import ModelPool, generate
from proxytune.experiment.identity import claim, sole_writer
from proxytune.experiment.planned import make_cells
from proxytune.experiment.prompts import check_prompts
from proxytune.files import ROOT, folder_name, write_json, write_jsonl
from proxytune.records import MetricInfo, Score
from proxytune.results import stats, trial_tables
from proxytune.results.verdict import Compared, compare, sentence
from proxytune.secrets import redacted
from proxytune.vllm.settings import OWN

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskTrial:
    """What a check found on one task.

    Attributes:
        task: its name.
        metric: its headline.
        info: how the headline is shown.
        available: how many examples it has; None where that is not known.
        systems: single model -> its metric (`records.Metric`).
        gain: the expert compared with the antiexpert; None without either.
        alphas: alpha -> the triple compared with its base.
        metrics: alpha -> the triple's metric.
        changed: alpha -> the share of tokens that are not the base's own choice; None where the
            task does not show them.
        confirmed: alpha -> the share of tokens that the expert would have drafted.
        verdict: the sentence.
    """

    task: str
    metric: str
    info: MetricInfo
    available: int | None
    systems: dict[str, Any]
    gain: Compared | None
    alphas: dict[float, Compared]
    metrics: dict[float, Any]
    changed: dict[float, float | None]
    confirmed: dict[float, float | None]
    verdict: str


def run_check(cfg: DictConfig, triple: str | None = None) -> list[TaskTrial]:
    """Tries the triple of a resolved `CheckConfig`, prints what was found, and returns it.

    Args:
        cfg: the configuration.
        triple: the chosen file of conf/triple, for the folder's name.

    Raises:
        UserError: the configuration is wrong; no model has been loaded.
        OSError: the folder cannot be written; everything finished is kept.
    """
    run = _as_run(cfg)
    run.name = folder_name(triple or _names(run))
    run.output_dir = cfg.output_dir or str(ROOT / "results" / "checks" / run.name)
    if engine_settings(run).name != OWN:
        raise UserError("proxytune check runs with engine=own; leave engine out")
    alphas = _alphas(cfg)
    tasks, specs = check_before_models(run)
    output = Path(run.output_dir)
    check_writable(output)
    with sole_writer(output):
        cells = make_cells(run, tasks, output)
        check_prompts(cells, specs)
        specs = serve_local(specs)
        if run.machine.threads:
            torch.set_num_threads(run.machine.threads)
        singles = [cell for cell in cells if cell.system != "proxy"]
        triples = {a: [_at(a, cell) for cell in cells if cell.system == "proxy"] for a in alphas}
        for cell in [*singles, *(each for at_alpha in triples.values() for each in at_alpha)]:
            claim(cell.folder, cell.identity, "all")
        found = _generate(run, specs, singles, triples)
        trials = [_trial(run, name, singles, triples) for name in tasks]
        stored = {"config": redacted(to_dict(cfg)), **provenance.environment()}
        stored |= {"costs": found.to_dict(), "tasks": [asdict(trial) for trial in trials]}
        write_json(output / "check.json", _plain(stored))
    trial_tables.show(found, trials, run.alpha if _scales(run) else None)
    return trials


def _as_run(cfg: DictConfig) -> DictConfig:
    """The experiment whose systems a check tries: those of the triple, without the tuned model.

    Raises:
        UserError: the triple has no base or no helper.
    """
    known = RunConfig.__dataclass_fields__.keys() - {"output_dir"}
    shared = {key: value for key, value in cfg.items() if key in known}
    run: Any = OmegaConf.merge(OmegaConf.structured(RunConfig), shared)
    helpers = members_of(run, "proxy").values()
    run.systems = [role for role in ("base", "expert", "antiexpert") if role in helpers]
    run.systems.append("proxy")
    run.report = False
    return run


def _names(run: DictConfig) -> str:
    """A folder's name for a triple that is in no file: its models' names."""
    members = [run.triple[role] for role in members_of(run, "proxy").values()]
    ids = [Path(m.id).name for m in members if m is not None and not OmegaConf.is_missing(m, "id")]
    return " ".join(ids) or "triple"


def _scales(run: DictConfig) -> bool:
    """Whether the formula has an alpha."""
    if is_default(run):
        return True
    from proxytune.loading.formulas import needs_of

    formula = formula_of(run)
    assert formula is not None  # only the default's is
    return bool(needs_of(formula)[1])


def _alphas(cfg: DictConfig) -> list[float]:
    """The alphas to try, ascending: those of the scan, and the one that is asked about.

    Raises:
        UserError: one of them is no finite number.
    """
    if not _scales(_as_run(cfg)):
        return [float(cfg.alpha)]
    given = {*map(float, cfg.alphas), float(cfg.alpha)}
    odd = next((alpha for alpha in given if not math.isfinite(alpha)), None)
    if odd is not None:
        raise UserError(f"alphas={odd}: an alpha is a finite number")
    return sorted(given)


def _at(alpha: float, cell: Cell) -> Cell:
    """The triple's cell at one alpha."""
    identity = cell.identity | {"alpha": alpha, "compared": True}
    return replace(cell, folder=cell.folder / f"alpha={alpha}", identity=identity)


def _generate(
    run: DictConfig,
    specs: dict[str, Any],
    singles: Sequence[Cell],
    triples: Mapping[float, Sequence[Cell]],
) -> costs.Costs:
    """Generates what is missing; returns the triple's costs."""
    settings = GenerationSettings(
        seed=run.decoding.seed,
        batch_size=run.decoding.batch_size,
        speculative=run.decoding.speculative,
        trace=run.decoding.trace,
        compare=True,
    )
    order = [each for each in ("expert", "antiexpert", "base", "proxy") if each in run.systems]
    members = {system: members_of(run, system) for system in order}
    with ModelPool(
        specs,
        members,
        alpha=run.alpha,
        formula=formula_of(run),
        cuda_graphs=run.machine.cuda_graphs,
    ) as pool:
        generate(singles, pool, settings)
        found = _costs(pool, specs, triples[run.alpha])
        for alpha, cells in triples.items():
            pool.alpha = alpha
            generate(cells, pool, settings)
    return found


def _costs(pool: ModelPool, specs: Mapping[str, Any], cells: Sequence[Cell]) -> costs.Costs:
    """Measures the triple at the alpha that is asked about."""
    from proxytune.api import load
    from proxytune.experiment.completions import render_prompts

    generator = pool.open("proxy")
    asked = [cell for cell in cells if isinstance(cell, TaskCell)]
    lengths = [
        max(map(len, prompt.token_ids.values())) + cell.decoding.max_new_tokens
        for cell in asked
        for prompt in render_prompts(cell.examples, generator.members)
    ]
    wanted = max((len(cell.examples) * cell.decoding.n for cell in asked), default=1)
    alone = load(generator.members["base"]) if specs["base"].api is None else None
    return costs.measure(generator, alone, lengths, wanted)


def _trial(
    run: DictConfig, name: str, singles: Sequence[Cell], triples: Mapping[float, Sequence[Cell]]
) -> TaskTrial:
    """Scores one task's cells and compares them."""
    single = {cell.system: cell for cell in singles if cell.task_name == name}
    triple = {a: next(c for c in cells if c.task_name == name) for a, cells in triples.items()}
    scores = {system: _score(cell) for system, cell in single.items()}
    at_alpha = {alpha: _score(cell) for alpha, cell in triple.items()}
    metric, info = next(iter(triple[run.alpha].infos.items()))

    def versus_base(ours: Sequence[Score], tests: int = 1) -> Compared:
        found = compare(ours, scores["base"], metric, info, tests)
        if found is None:
            raise UserError(f"task {name}: base and triple have no {metric} on the same examples")
        return found

    gain = None
    if {"expert", "antiexpert"} <= scores.keys():
        gain = compare(scores["expert"], scores["antiexpert"], metric, info)
    found = versus_base(at_alpha[run.alpha])
    scan = {alpha: versus_base(each, len(triple)) for alpha, each in at_alpha.items()}
    alone = compare(scores["expert"], at_alpha[run.alpha], metric, info) if gain else None
    agreed = {alpha: _agreed(cell) for alpha, cell in triple.items()}
    own = {a: costs.confirmed(each, "base") if each else None for a, each in agreed.items()}
    one = triple[run.alpha]
    available = one.identity["dataset"]["examples"] if isinstance(one, TaskCell) else None
    return TaskTrial(
        task=name,
        metric=metric,
        info=info,
        available=available,
        systems={system: _metric(name, system, each, metric) for system, each in scores.items()},
        gain=gain,
        alphas={alpha: versus_base(each) for alpha, each in at_alpha.items()},
        metrics={alpha: _metric(name, "proxy", each, metric) for alpha, each in at_alpha.items()},
        changed={a: None if share is None else 1 - share for a, share in own.items()},
        confirmed={
            a: costs.confirmed(each, "expert") if each else None for a, each in agreed.items()
        },
        verdict=sentence(
            found,
            task=name,
            info=info,
            alpha=run.alpha if _scales(run) else None,
            available=available,
            also=trial_tables.remarks(found, scan, run.alpha, alone, info),
        ),
    )


def _score(cell: Cell) -> list[Score]:
    """Scores a cell, and keeps the scores beside its completions."""
    scores = cell.score().scores
    write_jsonl(cell.folder / "scores.jsonl", scores)
    return scores


def _metric(task: str, system: str, scores: Sequence[Score], metric: str) -> Any:
    found = stats.metrics(task, system, scores)
    return next((each for each in found if each.metric == metric), None)


def _agreed(cell: Cell) -> list[dict[str, int]] | None:
    """How many tokens of each completion the members alone would have chosen, too."""
    if not isinstance(cell, TaskCell):
        return None
    stored = read_completions(cell.completions_path)
    asked = [stored[example.id] for example in cell.examples]
    return [samples[i].extra["agreed"] for samples in asked for i in range(cell.decoding.n)]


def _plain(value: Any) -> Any:
    """A JSON value: numbers as keys become text, and what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
