"""The configured models as `ModelSpec`s."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from proxytune.config.formulas import member_of, pair_roles
from proxytune.config.schema import to_dict
from proxytune.errors import UserError
from proxytune.loading.launched import RANKS
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.roles import ROLES
from proxytune.vllm.settings import EngineSettings


def engine_settings(cfg: DictConfig) -> EngineSettings:
    """The configured engine."""
    return EngineSettings(**to_dict(cfg.engine))


def model_specs(cfg: DictConfig) -> dict[str, ModelSpec]:
    """Role -> `ModelSpec` of the configured triple, with the machine's devices filled in."""
    specs = {}
    devices = cfg.machine.devices or {}
    roles = (*ROLES, *pair_roles(cfg))
    for name in devices:
        if name not in roles:
            raise UserError(f"machine.devices.{name}: members are {', '.join(roles)}")
    for role in roles:
        member = member_of(cfg, role)
        if member is None or OmegaConf.is_missing(member, "id"):
            continue
        settings = to_dict(member)
        device = settings["device"] or devices.get(role) or cfg.machine.device
        # "auto" for one role spreads it over all GPUs; for the machine it means the first device
        spread = device == "auto" and role in devices
        settings["device"] = device if spread or device != "auto" else None
        if cfg.machine.tensor_parallel > 1 and settings["api"] is None:
            settings["device"] = RANKS
        if settings["max_memory"] is None and settings["device"] == "auto":
            limits = to_dict(cfg.machine.max_memory) if cfg.machine.max_memory else {}
            numbered = {int(k) if k.isdecimal() else k: limit for k, limit in limits.items()}
            settings["max_memory"] = numbered or None
        settings["quantization"] = settings["quantization"] or None
        settings["format"] = PromptFormat(**settings["format"])
        if settings["api"] and not settings["api"]["cache"] and "output_dir" in cfg:
            settings["api"]["cache"] = str(Path(cfg.output_dir, "api.sqlite"))
        specs[role] = ModelSpec(**settings)
    return specs
