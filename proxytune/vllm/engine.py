"""One vLLM engine, and who waits for its outputs."""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false

import gc
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from proxytune.errors import UserError
from proxytune.vllm.checks import SWITCH, uses_v2
from proxytune.vllm.plan import SystemPlan
from proxytune.vllm.plugin import ARCHITECTURE, KEY
from proxytune.vllm.requests import Asked
from proxytune.vllm.settings import OWN, EngineSettings

Sink = Callable[[Any], None]


def prepare_environment() -> None:
    """Sets vLLM's switches that the engine needs; what the user has set stays.

    The scheduler runs in this process, so an engine ends with the run. The longest row is one token
    longer than what the members read, for that token is predicted and never read.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def arguments(plan: SystemPlan, settings: EngineSettings) -> dict[str, Any]:
    """The arguments of vLLM's engine for a system."""
    base = plan.specs["base"]
    own: dict[str, Any] = {"vocab_size": plan.vocab_size}
    given: dict[str, Any] = {
        "model": plan.paths["base"],
        "tokenizer": base.id,
        "revision": base.revision,
        "trust_remote_code": base.trust_remote_code,
        "dtype": plan.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": plan.positions(settings.max_model_len) + 1,
        "max_logprobs": -1,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": _eager(plan, settings),
        "speculative_config": plan.speculative(settings),
        "additional_config": {KEY: own},
        "disable_log_stats": True,
    }
    if plan.composed:
        own |= plan.described()
        given["hf_overrides"] = {"architectures": [ARCHITECTURE]}
    return given | (settings.options or {})


def _eager(plan: SystemPlan, settings: EngineSettings) -> bool:
    """Whether nothing is compiled or captured.

    On the runner V2 a CUDA graph would replay one pass's alphas and prompts. On a CPU, compilation
    takes minutes, and gains a tenth to a fifth (docs/performance.md): who serves may ask for it.
    """
    from vllm.platforms import current_platform

    if settings.enforce_eager is not None:
        return settings.enforce_eager
    return current_platform.is_cpu() or ("expert" in plan.specs and uses_v2())


class Engine:
    """A vLLM engine in this process. Loops and ratings share it; each output goes to its sink.

    Args:
        plan: the system.
        settings: of the engine.

    Raises:
        UserError: vLLM chooses another model runner than it was asked for.
    """

    def __init__(self, plan: SystemPlan, settings: EngineSettings) -> None:
        prepare_environment()
        from pydantic import ValidationError
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.plan = plan
        self.settings = settings
        self.ours = settings.sampler == OWN and settings.speculative is None
        unknown = [n for n in settings.options or {} if n not in EngineArgs.__dataclass_fields__]
        if unknown:
            raise UserError(f"engine.options.{unknown[0]}: vLLM's engine has no such argument")
        try:
            config = EngineArgs(**arguments(plan, settings)).create_engine_config()
        except ValidationError as error:  # of vLLM's own settings, before it loads anything
            reason = error.errors()[0]["msg"].splitlines()[0]
            raise UserError(f"vLLM refuses its settings: {reason}") from error
        self.per_request = config.use_v2_model_runner
        if len(plan.specs) > 1 and self.per_request != uses_v2():
            raise UserError(
                f"vLLM takes the model runner {'V2' if self.per_request else 'V1'} for this "
                f"triple; say so with {SWITCH}={int(self.per_request)}"
            )
        if self.ours:
            kind = "V2" if self.per_request else "V1"
            config.model_config.logits_processors = [f"proxytune.vllm.sampling:{kind}"]
        self.max_rows = config.scheduler_config.max_num_seqs
        self._llm = LLMEngine.from_vllm_config(config)
        self._sinks: dict[str, Sink] = {}
        self._numbers = itertools.count()

    def submit(self, asked: Asked, sink: Sink) -> str:
        """Queues a request; `sink` gets its outputs. Returns its id."""
        name = f"proxytune-{next(self._numbers)}"
        self._sinks[name] = sink
        self._llm.add_request(name, *asked)
        return name

    def abort(self, names: Sequence[str]) -> None:
        """Drops requests; those that have ended are ignored."""
        running = [name for name in names if self._sinks.pop(name, None) is not None]
        if running:
            self._llm.abort_request(running, internal=True)

    def step(self) -> None:
        """One pass of vLLM; hands every output to its sink."""
        for output in self._llm.step():
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue
            if output.finished:
                del self._sinks[output.request_id]
            sink(output)

    def finish(self, asked: Sequence[Asked]) -> list[Any]:
        """Runs requests to their ends, beside all others; their last outputs, in order."""
        outputs: list[Any] = [None] * len(asked)
        left = set(range(len(asked)))
        names = []

        def take(index: int, output: Any) -> None:
            outputs[index] = output
            if output.finished:
                left.discard(index)

        try:
            for index, each in enumerate(asked):
                names.append(self.submit(each, lambda out, index=index: take(index, out)))
            while left:
                self.step()
        finally:
            self.abort(names)
        return outputs

    def close(self) -> None:
        """Frees the memory; the engine cannot be used afterwards."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
