"""The systems of an experiment on vLLM, one engine after the other."""

import logging
from collections.abc import Mapping

from proxytune.loading.spec import ModelSpec
from proxytune.roles import MEMBERS
from proxytune.vllm.checks import plan_system
from proxytune.vllm.engine import Engine
from proxytune.vllm.generator import VllmGenerator
from proxytune.vllm.merging import with_merged
from proxytune.vllm.settings import OWN, EngineSettings

log = logging.getLogger(__name__)


def load_engine(
    specs: Mapping[str, ModelSpec], settings: EngineSettings, alpha: float = 1.0
) -> VllmGenerator:
    """Loads a single model ("base"), or a triple, into a vLLM engine.

    Args:
        specs: role -> model, as `check_triple` has accepted them.
        settings: of the engine.
        alpha: scale on (expert - antiexpert).

    Raises:
        UserError: see `checks.plan_system`.
    """
    plan = with_merged(plan_system(specs, settings, alpha))
    if settings.sampler != OWN:
        log.warning("engine.sampler=vllm: samples are vLLM's draws, not those of the own engine")
    return VllmGenerator(Engine(plan, settings))


class EnginePool:
    """Gives a run its systems; one engine is in memory at a time.

    Use it as a context manager: at its end the memory is free, so that judges find it empty.

    Args:
        specs: role of the triple -> what to load.
        alpha: scale on (expert - antiexpert).
        settings: of the engines.
    """

    def __init__(
        self, specs: Mapping[str, ModelSpec], *, alpha: float, settings: EngineSettings
    ) -> None:
        self._specs = specs
        self._alpha = alpha
        self._settings = settings
        self._engine: Engine | None = None

    def open(self, system: str) -> VllmGenerator:
        """Frees the engine of the system before, and loads this one's."""
        self._close()
        specs = {role: self._specs[name] for role, name in MEMBERS[system].items()}
        generator = load_engine(specs, self._settings, self._alpha)
        self._engine = generator.engine
        return generator

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> "EnginePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
