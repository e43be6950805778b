"""The dataclass schema of a run: Hydra composes conf/ into it and refuses any key it lacks.

`RunConfig` stops at the runner; deeper functions take explicit arguments.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from proxytune.config import overrides
from proxytune.files import ROOT
from proxytune.loading.spec import ModelSpec
from proxytune.roles import COMPARED
from proxytune.server.settings import ServerSettings
from proxytune.vllm.settings import EngineSettings

DEFAULT_FORMULA = {"_target_": "proxytune.proxy.combine_logits"}


@dataclass
class PairConfig:
    """One of several pairs that steer a base together; each member has its own prompt format.

    Attributes:
        alpha: scale on (expert - antiexpert); null is the run's `alpha`.
    """

    expert: ModelSpec = field(default_factory=ModelSpec)
    antiexpert: ModelSpec = field(default_factory=ModelSpec)
    alpha: float | None = None


@dataclass
class TripleConfig:
    """The models of an experiment; `tuned` is the directly tuned one that it compares with.

    Attributes:
        pairs: NAME -> pair. If there are any, the system `proxy` is the base with all of them, and
            `expert` and `antiexpert` are systems of their own only.
        vocabulary: of the triple: "strict", "special" or "map" (docs/vocabularies.md).
    """

    base: ModelSpec = field(default_factory=ModelSpec)
    expert: ModelSpec = field(default_factory=ModelSpec)
    antiexpert: ModelSpec = field(default_factory=ModelSpec)
    tuned: ModelSpec | None = None
    pairs: dict[str, PairConfig] = field(default_factory=dict)
    vocabulary: str = "strict"


@dataclass
class DecodingConfig:
    """What the command line may change about decoding; null keeps the task's own setting.

    Attributes:
        batch_size: rows decoded at once; "auto" follows the device's memory.
        speculative: "auto", false, or a fixed number of drafted tokens.
        seed: of sampling; a sample depends on it, its example and its number alone.
        trace: record per token how far proxy-tuning moved its probability (proxy system).
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, ignore_eos, think_budget, think_least, think_word, n: override every task
        of the run; see `records.Decoding`.
    """

    batch_size: Any = "auto"
    speculative: Any = "auto"
    seed: int = 0
    trace: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    think_budget: int | None = None
    think_least: int | None = None
    think_word: str | None = None
    n: int | None = None


@dataclass
class MachineConfig:
    """Where the members run.

    Attributes:
        device: "auto" is the first GPU, or the CPU where there is none.
        devices: role -> device, over `device`; "auto" spreads one model over all GPUs.
        threads: CPU threads of torch; null chooses the machine's cores.
        cuda_graphs: records decode steps and replays them, for models on one GPU each.
        max_memory: the most of each device that a spread model may take ({0: 20GiB, cpu: 60GiB}),
            over accelerate's own choice.
        replicas: processes that each hold the whole triple and share the prompts, on Ray.
        ray_address: of a Ray cluster that they run on ("auto": the one that this machine is in);
            null is this machine.
        tensor_parallel: processes that share every model, started by torchrun.
    """

    device: str = "auto"
    devices: dict[str, str] | None = field(default_factory=dict)
    threads: int | None = None
    cuda_graphs: bool = False
    max_memory: dict[Any, Any] | None = field(default_factory=dict)
    replicas: int = 1
    ray_address: str | None = None
    tensor_parallel: int = 1


@dataclass
class TrackingConfig:
    """Experiment tracking; "disabled" or "wandb" (mode online, offline)."""

    kind: str = "disabled"
    project: str = "proxytune"
    entity: str | None = None
    mode: str = "online"


@dataclass
class PaperConfig:
    """Which cells of results/paper the table shows beside ours."""

    table: str = MISSING
    size: str = MISSING


@dataclass
class NeedsConfig:
    """What a run takes (estimates): checked, and printed before it starts.

    Attributes:
        gpu_memory_gb: of all GPUs together; 0 runs on a CPU.
        disk_gb: of checkpoints to download.
        gpu_hours: on A100-80GB cards.
    """

    gpu_memory_gb: float = 0
    disk_gb: float = 0
    gpu_hours: float = 0


@dataclass
class RunConfig:
    """One experiment: systems x tasks.

    Attributes:
        name: the experiment's name; nothing parses it.
        root: the repository's folder, for data that it ships.
        systems: which rows the table gets, out of base, expert, antiexpert, proxy and tuned.
        alpha: scale on (expert - antiexpert).
        formula: combines the members' logits: `_target_` names the function, the other keys are
            its settings (proxytune/formula.py).
        limit: first examples of each task only; null is all of them.
        stage: "all", "generate", or "score" (stored completions, without a model).
        output_dir: the results folder; resumed when it holds the same configuration.
        report: whether to write report.html at the end.
    """

    name: str = MISSING
    root: str = str(ROOT)
    triple: TripleConfig = field(default_factory=TripleConfig)
    task: dict[str, Any] = field(default_factory=dict, metadata=overrides.CLOSED)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    engine: EngineSettings = field(default_factory=EngineSettings)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    systems: list[str] = field(default_factory=lambda: list(COMPARED))
    alpha: float = 1.0
    formula: dict[str, Any] = field(
        default_factory=lambda: dict(DEFAULT_FORMULA), metadata=overrides.CLOSED
    )
    limit: int | None = None
    stage: str = "all"
    output_dir: str = MISSING
    report: bool = True
    paper: PaperConfig | None = None
    needs: NeedsConfig = field(default_factory=NeedsConfig)


@dataclass
class CheckConfig:
    """`proxytune check`: a triple tried on a few examples of a task.

    Attributes:
        triple, task, decoding, machine, engine, formula: as in `RunConfig`.
        alpha: the one that the verdict is about.
        alphas: further ones, on the same examples.
        limit: first examples of each task; null is all of them.
        output_dir: keeps the completions, so that a killed check goes on; null is a folder named by
            the triple, in results/checks.
    """

    root: str = str(ROOT)
    triple: TripleConfig = field(default_factory=TripleConfig)
    task: dict[str, Any] = field(default_factory=dict, metadata=overrides.CLOSED)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    engine: EngineSettings = field(default_factory=EngineSettings)
    alpha: float = 1.0
    alphas: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 1.5, 2.0])
    formula: dict[str, Any] = field(
        default_factory=lambda: dict(DEFAULT_FORMULA), metadata=overrides.CLOSED
    )
    limit: int | None = 50
    output_dir: str | None = None


@dataclass
class ServeConfig(ServerSettings):
    """`proxytune serve`: one system behind HTTP.

    Attributes:
        triple: the models.
        machine: where they run.
        engine: what runs them.
        system: what answers: proxy, base, expert, antiexpert or tuned.
        alpha: scale on (expert - antiexpert); a request may bring its own.
        formula: as in `RunConfig`.
        model: the name that clients use; null is the triple's name and the system's.
        host: the address to listen on; the default is reachable from this machine alone.
        port: 0 takes any free one.
        batch_size: rows decoded at once; "auto" follows the device's memory.
        speculative: "auto", false, or a fixed number of drafted tokens.
        playground: serves every system of the triple, and a page at / that shows them side by side.
    """

    root: str = str(ROOT)
    triple: TripleConfig = field(default_factory=TripleConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    engine: EngineSettings = field(default_factory=EngineSettings)
    system: str = "proxy"
    alpha: float = 1.0
    formula: dict[str, Any] = field(
        default_factory=lambda: dict(DEFAULT_FORMULA), metadata=overrides.CLOSED
    )
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: Any = "auto"
    speculative: Any = "auto"
    playground: bool = False


def to_dict(node: DictConfig) -> dict[str, Any]:
    """A resolved node as plain Python values."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def register() -> None:
    """Makes the schemas known to Hydra under the names that conf/*.yaml begin with."""
    overrides.install()
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
    ConfigStore.instance().store(name="check_schema", node=CheckConfig)
