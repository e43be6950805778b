"""The dataclass schema of a run: Hydra composes conf/ into it and refuses any key it lacks.

`RunConfig` stops at the runner; deeper functions take explicit arguments.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from proxytune.config import overrides
from proxytune.files import ROOT
from proxytune.members.api.settings import ApiSettings
from proxytune.server.settings import ServerSettings


@dataclass
class FormatConfig:
    """How a model wants its prompts; see `proxytune.loading.prompting.PromptFormat`.

    Attributes:
        kind: "raw" (the text as it stands) or "chat" (through a chat template).
        chat_template: a shipped template's name or a file; null is the tokenizer's own.
        use_system: False drops the system turn (for templates without one).
    """

    kind: str = "raw"
    chat_template: str | None = None
    use_system: bool = True


@dataclass
class ModelConfig:
    """One member of a triple; see `proxytune.loading.spec.ModelSpec`.

    Attributes:
        id: a hub id or a local folder. No model is ever assumed.
        revision: a branch, tag or commit of the hub repository.
        dtype: "auto" is the checkpoint's own; else float32, bfloat16 or float16.
        device: null leaves it to the machine group; "auto" spreads over all GPUs.
        quantization: arguments of transformers' BitsAndBytesConfig; none quantises nothing.
        adapter: a PEFT adapter's id or folder. An expert that adapts the antiexpert's own
            checkpoint shares its weights.
        adapter_revision: as `revision`, for the adapter.
        attn_implementation: null leaves it to transformers.
        trust_remote_code: lets the checkpoint bring its own modelling code.
        format: how prompts are rendered for it.
        api: the endpoint that serves it (base only); `id` then names its tokenizer.
    """

    id: str = MISSING
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization: dict[str, Any] | None = field(default_factory=dict)
    adapter: str | None = None
    adapter_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    format: FormatConfig = field(default_factory=FormatConfig)
    api: ApiSettings | None = None


@dataclass
class TripleConfig:
    """The models of an experiment; `tuned` is the directly tuned one that it compares with."""

    base: ModelConfig = field(default_factory=ModelConfig)
    expert: ModelConfig = field(default_factory=ModelConfig)
    antiexpert: ModelConfig = field(default_factory=ModelConfig)
    tuned: ModelConfig | None = None


@dataclass
class DecodingConfig:
    """What the command line may change about decoding; null keeps the task's own setting.

    Attributes:
        batch_size: rows decoded at once; "auto" follows the device's memory.
        speculative: "auto", false, or a fixed number of drafted tokens.
        seed: of sampling; a sample depends on it, its example and its number alone.
        trace: record per token how far proxy-tuning moved its probability (proxy system).
        max_new_tokens, temperature, top_p, top_k, n: override every task of the run.
    """

    batch_size: Any = "auto"
    speculative: Any = "auto"
    seed: int = 0
    trace: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None


@dataclass
class MachineConfig:
    """Where the members run.

    Attributes:
        device: "auto" is the first GPU, or the CPU where there is none.
        devices: role -> device, over `device`; "auto" spreads one model over all GPUs.
        threads: CPU threads of torch; null chooses the machine's cores.
        cuda_graphs: records decode steps and replays them, for models on one GPU each.
    """

    device: str = "auto"
    devices: dict[str, str] | None = field(default_factory=dict)
    threads: int | None = None
    cuda_graphs: bool = False


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
        systems: which rows the table gets, out of `SYSTEMS`.
        alpha: scale on (expert - antiexpert).
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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    systems: list[str] = field(default_factory=lambda: ["base", "expert", "proxy", "tuned"])
    alpha: float = 1.0
    limit: int | None = None
    stage: str = "all"
    output_dir: str = MISSING
    report: bool = True
    paper: PaperConfig | None = None
    needs: NeedsConfig = field(default_factory=NeedsConfig)


@dataclass
class ServeConfig(ServerSettings):
    """`proxytune serve`: one system behind HTTP.

    Attributes:
        triple: the models.
        machine: where they run.
        system: which of them answers, out of `SYSTEMS`.
        alpha: scale on (expert - antiexpert); a request may bring its own.
        model: the name that clients use; null is the triple's name and the system's.
        host: the address to listen on; the default is reachable from this machine alone.
        port: 0 takes any free one.
        batch_size: rows decoded at once; "auto" follows the device's memory.
        speculative: "auto", false, or a fixed number of drafted tokens.
    """

    root: str = str(ROOT)
    triple: TripleConfig = field(default_factory=TripleConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    system: str = "proxy"
    alpha: float = 1.0
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: Any = "auto"
    speculative: Any = "auto"


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
