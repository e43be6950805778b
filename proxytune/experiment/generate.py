"""Generates the completions that a run's cells still lack, one system after the other."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from proxytune.experiment.cells import Cell, GenerationSettings
from proxytune.experiment.progress import CellProgress, RunProgress, generation_progress

if TYPE_CHECKING:  # they import transformers' models, and most refusals come before those
    from proxytune.generator import Generator
    from proxytune.loading.formulas import Alphas
    from proxytune.loading.loaded import LoadedModel
    from proxytune.loading.spec import ModelSpec
    from proxytune.proxy import Formula


class Pool(Protocol):
    """Gives a run its systems; the place where a run is spread over several machines."""

    def open(self, system: str) -> "Generator":
        """Loads the system.

        Of the generator, cells use `generate(prompts, sample_keys=..., on_finish=..., ...)`,
        `members` (role -> prompt format and tokenizer) and the base's `estimate` and `spending`.
        """
        ...


def generate(
    cells: Sequence[Cell],
    pool: Pool,
    settings: GenerationSettings,
    on_begin: Callable[[Cell, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Generates every cell's missing completions, except those that another point of a sweep has.

    Args:
        cells: of all systems and tasks; a system is opened only if one of its cells lacks
            completions.
        pool: opens the systems.
        settings: the run's own settings of generation.
        on_begin: is told of each cell that begins, and how many of its steps are done already.

    Returns:
        "system/task" -> tokens and seconds of this session, for cells that count them.
    """
    throughput: dict[str, dict[str, float]] = {}
    with generation_progress([(c.system, c.task_name, c.total) for c in cells]) as run:
        todo: dict[str, list[tuple[Cell, CellProgress]]] = {}
        for cell, progress in zip(cells, run.cells, strict=True):
            if _shared(cell, progress):
                todo.setdefault(cell.system, []).append((cell, progress))
        for system, of_system in todo.items():
            # points that run at the same time may have gone on
            left = [(cell, progress) for cell, progress in of_system if _shared(cell, progress)]
            if left:
                throughput |= _generate_system(run, pool, system, left, settings, on_begin)
    return throughput


def _shared(cell: Cell, progress: CellProgress) -> int:
    """Takes what other points of the sweep have; how many steps are missing then."""
    cell.share()
    missing = len(cell.missing())
    progress.done(cell.total - missing)
    return missing


def _generate_system(
    run: RunProgress,
    pool: Pool,
    system: str,
    todo: Sequence[tuple[Cell, CellProgress]],
    settings: GenerationSettings,
    on_begin: Callable[[Cell, int], None] | None,
) -> dict[str, dict[str, float]]:
    """Generates one system's cells.

    The generator lives no longer than this call: were it still referenced when the next system is
    opened, its models would stay in memory beside the next ones.
    """
    with run.loading(system):
        generator = pool.open(system)
    throughput = {}
    for cell, progress in todo:
        progress.begin()
        if on_begin is not None:
            on_begin(cell, progress.examples)
        spent = cell.generate(generator, settings, progress)
        if spent is not None:
            throughput[f"{cell.system}/{cell.task_name}"] = spent
    return throughput


class ModelPool:
    """Loads each model of a triple once, and frees it when no later system needs it.

    Use it as a context manager: at its end every model is freed, so that judges find the memory
    empty.

    Args:
        specs: role of the triple -> what to load.
        systems: system -> the engine's role -> the triple's name, in the order in which they will
            be opened; some may be left out.
        alpha: scale on (expert - antiexpert); pair -> its own, where there are several. Between two
            calls of `open` it may be set anew.
        formula: combines the members' logits; None is proxy-tuning.
        vocabulary: as in `proxytune.api.load`.
        cuda_graphs: as in `proxytune.api.load`.
    """

    def __init__(
        self,
        specs: dict[str, "ModelSpec"],
        systems: Mapping[str, Mapping[str, str]],
        *,
        alpha: "Alphas",
        formula: "Formula | None" = None,
        vocabulary: str = "strict",
        cuda_graphs: bool,
    ) -> None:
        self._specs = specs
        self._systems = dict(systems)
        self.alpha = alpha
        self._formula = formula
        self._vocabulary = vocabulary
        self._cuda_graphs = cuda_graphs
        self._models: dict[str, LoadedModel] = {}

    def open(self, system: str) -> "Generator":
        """Frees the models that only earlier systems used, and loads those that are missing."""
        from proxytune.api import arguments, load
        from proxytune.loading.build import shares_weights
        from proxytune.loading.formulas import experts_of

        roles = self._systems[system]
        order = list(self._systems)
        left = order[order.index(system) :]
        wanted = {name for each in left for name in self._systems[each].values()}
        for expert in experts_of(list(roles)):
            pair = {expert, expert.removesuffix("expert") + "antiexpert"}
            if pair <= roles.keys() and shares_weights(
                *(self._specs[r] for r in sorted(pair)[::-1])
            ):
                # One copy of the weights then serves both: those of earlier systems must go.
                wanted -= pair
        self._free(self._models.keys() - wanted)
        small_first = sorted(
            roles.values(), key=lambda n: (n == "base", not n.endswith("antiexpert"))
        )
        for name in small_first:
            if name not in self._models:
                self._models[name] = self._load(name, system)
        members: dict[str, Any] = {role: self._models[name] for role, name in roles.items()}
        how: dict[str, Any] = {
            "alpha": self.alpha,
            "formula": self._formula,
            "vocabulary": self._vocabulary,
        }
        how = how if len(roles) > 1 else {}
        return load(**arguments(members), **how, cuda_graphs=self._cuda_graphs)

    def _load(self, name: str, system: str) -> "LoadedModel":
        from proxytune.loading.build import weights_of
        from proxytune.loading.load import load_member

        share = weights_of(name, self._specs, self._models) if system == "proxy" else None
        return load_member(self._specs[name], share=share)

    def _free(self, names: set[str]) -> None:
        for name in names:
            del self._models[name]
        if names:
            gc.collect()  # a model and its caches may refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __enter__(self) -> "ModelPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._free(set(self._models))
