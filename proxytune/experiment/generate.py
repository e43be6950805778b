"""Generating what the cells of a run still lack."""

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from proxytune import provenance
from proxytune.experiment.cells import Cell, HarnessCell
from proxytune.experiment.progress import GenerationProgress, generation_progress
from proxytune.files import JsonlWriter
from proxytune.records import Completion
from proxytune.roles import MEMBERS

log = logging.getLogger(__name__)


def generate(
    cfg: DictConfig, specs: dict[str, Any], cells: Sequence[Cell | HarnessCell]
) -> dict[str, Any]:
    """Generates what is missing; returns system/task -> tokens and seconds of this session."""
    throughput: dict[str, Any] = {}
    by_system: dict[str, list[Cell | HarnessCell]] = defaultdict(list)
    for cell in cells:
        by_system[cell.system].append(cell)
    pool = _Pool(cfg, specs)
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
    from proxytune.loading.prompting import encode, render

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
    base = generator.system.members["base"]
    lengths = [len(prompt["base"]) for prompt in prompts]
    lockstep = cfg.decoding.speculative is False or cfg.decoding.trace
    drafted = cell.system == "proxy" and not lockstep
    if estimate := base.estimate(lengths, cell.decoding, drafted):
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
    if spending := base.spending():
        log.info("%s, %s: %s", cell.task_name, cell.system, spending)
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

    def __init__(self, cfg: DictConfig, specs: dict[str, Any]) -> None:
        self.cfg = cfg
        self.specs = specs
        self._models: dict[str, Any] = {}

    def open(self, system: str, keep_for: Sequence[str]) -> Any:
        """A generator of this system; models that only earlier systems used are freed."""
        from proxytune.api import load
        from proxytune.loading.build import shares_weights
        from proxytune.loading.load import load_member

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
