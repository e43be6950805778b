"""The dataclass schema of a run: Hydra composes conf/ into it and refuses any key it lacks.

`RunConfig` stops at the runner; deeper functions take explicit arguments.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("base", "expert", "antiexpert", "proxy", "tuned")
ROLES = ("base", "expert", "antiexpert", "tuned")


@dataclass
class FormatConfig:
    """How a model wants its prompts; see `proxytune.prompting.PromptFormat`.

    Attributes:
        kind: "raw" (the text as it stands) or "chat" (through a chat template).
        chat_template: a shipped template's name or a file; null is the tokenizer's own.
        use_system: False drops the system turn (for templates without one).
    """

    kind: str = "raw"
    chat_template: str | None = None
    use_system: bool = True


@dataclass
class ApiConfig:
    """An OpenAI-compatible endpoint that serves a base; docs/black_box.md.

    Attributes:
        base_url: "https://host/v1"; "local" serves the base's own folder from this process.
        model: the name by which the server knows the model.
        api_key_env: the environment variable that holds the key; null sends none.
        top_logprobs: tokens listed at each position; -1 is the whole vocabulary, "auto" the most
            that the server grants, up to 100.
        endpoint: "auto", "completions" or "chat".
        blocks: score several tokens with one request where the server rates prompts.
        foreign_tokenizer: the server's tokenizer is another one than the triple's: prompts go as
            text, listed words come back as the token that writes them; for single-token answers.
        max_concurrency: requests at once.
        timeout_s: of one request.
        retry_for_s: how long a request that fails is tried again.
        prompt_price, completion_price: money per 1,000 tokens.
        max_requests, max_tokens, max_cost: the budget of a results folder, over all its runs.
        cache: the file of answers; null is api.sqlite in the results folder.
    """

    base_url: str = MISSING
    model: str = MISSING
    api_key_env: str | None = None
    top_logprobs: Any = "auto"
    endpoint: str = "auto"
    blocks: bool = True
    foreign_tokenizer: bool = False
    max_concurrency: int = 8
    timeout_s: float = 120
    retry_for_s: float = 600
    prompt_price: float = 0
    completion_price: float = 0
    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    cache: str | None = None


@dataclass
class ModelConfig:
    """One member of a triple; see `proxytune.model.ModelSpec`.

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
    quantization: dict[str, Any] | None = field(default_factory=dict)  # Hydra fills no null
    adapter: str | None = None
    adapter_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    format: FormatConfig = field(default_factory=FormatConfig)
    api: ApiConfig | None = None


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
    devices: dict[str, str] = field(default_factory=dict)
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
    task: dict[str, Any] = field(default_factory=dict)
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
class ServerSettings:
    """What a server lets its clients do.

    Attributes:
        api_key: must come with every request as a bearer token; null lets everybody in.
        max_logprobs: log-probabilities per token that a client may ask for; -1 is the vocabulary.
        prompt_logprobs: whether prompts are rated (prompt_logprobs, echo with logprobs).
        chat_only: leaves /v1/completions out.
        max_request_bytes: of a request's body.
        max_tokens: of one completion; null is the models' context.
        max_completions: prompts times n of one request.
        max_waiting: completions that may wait for a row; then clients get 429.
        timeout: seconds that one request may take.
    """

    api_key: str | None = None
    max_logprobs: int = 20
    prompt_logprobs: bool = True
    chat_only: bool = False
    max_request_bytes: int = 4 * 2**20
    max_tokens: int | None = None
    max_completions: int = 512
    max_waiting: int = 512
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ValueError("api_key is empty; give a secret, or null to let everybody in")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs}; -1 is the whole vocabulary")
        for name in (
            "max_request_bytes",
            "max_tokens",
            "max_completions",
            "max_waiting",
            "timeout",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")


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
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
