"""Everything that engine=vllm refuses, before a model is loaded."""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from proxytune.engine.combining import Combination
from proxytune.engine.system import Prompt
from proxytune.errors import UserError
from proxytune.loading.formulas import name_of
from proxytune.loading.spec import ModelSpec
from proxytune.proxy import combine_logits
from proxytune.records import Decoding
from proxytune.vllm.plan import SystemPlan, make_plan
from proxytune.vllm.settings import OWN, EngineSettings, check_version

SWITCH = "VLLM_USE_V2_MODEL_RUNNER"
V1_READS_ONE = (
    "vLLM's model runner V1 gives all members one prompt and all requests one alpha; start with "
    f"{SWITCH}=1 (where Triton works), or use engine=own"
)
_FULL = ("full_attention", "attention")  # the layers of a model whose attention sees everything


def uses_v2() -> bool:
    """Whether vLLM takes its model runner V2 here: by the user's word, or where Triton works."""
    said = os.environ.get(SWITCH)
    if said is not None:
        return said.strip().lower() in ("1", "true")
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def check_settings(settings: EngineSettings) -> None:
    """Refuses what needs no model: contradicting settings, a vLLM that was not tried.

    Raises:
        UserError: see above.
    """
    settings.check()
    if settings.name == OWN:
        return
    check_version()
    if settings.speculative is not None and uses_v2():
        raise UserError(
            f"engine.speculative={settings.speculative}: tried on vLLM's model runner V1 alone; "
            f"start with {SWITCH}=0, or leave it out"
        )


def check_specs(specs: Mapping[str, ModelSpec], settings: EngineSettings) -> None:
    """Refuses members that vLLM does not run here; `specs` is role -> model.

    Raises:
        UserError: a base behind an API, settings of the own engine, a device of another vLLM.
    """
    from vllm.platforms import current_platform

    place = "cpu" if current_platform.is_cpu() else "cuda"
    for role, spec in specs.items():
        if spec.api is not None:
            raise UserError(f"{role}: a model behind an API needs engine=own, not engine=vllm")
        if spec.format.think_end is not None:
            raise UserError(f"{role}: format.think_end needs engine=own, not engine=vllm")
        if spec.quantization:
            raise UserError(
                f"{role}: quantization is a setting of engine=own; with vLLM, give the base's as "
                "engine.quantization"
            )
        if spec.attn_implementation is not None:
            raise UserError(
                f"{role}: attn_implementation={spec.attn_implementation} is a setting of "
                "engine=own; vLLM chooses its attention (engine.options.attention_backend)"
            )
        kind, _, number = (spec.device or place).partition(":")
        if number or kind not in ("auto", place):
            raise UserError(
                f"{role}: device={spec.device}: this vLLM runs on {place}, and shares GPUs by "
                "engine.tensor_parallel_size and CUDA_VISIBLE_DEVICES; leave the device out"
            )
    if settings.speculative == "draft_model" and "expert" not in specs:
        raise UserError("engine.speculative=draft_model: the expert drafts, and there is none")


def plan_system(
    specs: Mapping[str, ModelSpec], settings: EngineSettings, alpha: float = 1.0
) -> SystemPlan:
    """The plan of a system, after every refusal that needs its configurations.

    Args:
        specs: role -> model, as `check_triple` has accepted them.
        settings: of the engine.
        alpha: scale on (expert - antiexpert).

    Raises:
        UserError: see the functions below, and `make_plan`.
    """
    plan = make_plan(specs, alpha)
    plan.positions(settings.max_model_len)
    for role, model in plan.models.items():
        _check_heads(role, specs[role].id, model.configs[0].get_text_config())
    if len(specs) > 1:
        for role, model in plan.models.items():
            _check_member(role, specs[role], model.configs[0])
        _check_triple(plan, settings)
    return plan


def _check_triple(plan: SystemPlan, settings: EngineSettings) -> None:
    codes = [role for role, spec in plan.specs.items() if spec.trust_remote_code]
    if codes and len(codes) < len(plan.specs):
        raise UserError(
            f"trust_remote_code of the {codes[0]} alone: vLLM trusts all members' code or none"
        )
    sizes = [plan.models[role].output_size for role in ("base", "expert")]
    if settings.speculative == "draft_model" and len(set(sizes)) > 1:
        raise UserError(
            f"engine.speculative=draft_model: the logits of base and expert have {sizes[0]} and "
            f"{sizes[1]} entries, and vLLM drafts with equal ones alone; take "
            "engine.speculative=ngram"
        )
    if settings.quantization == "bitsandbytes":
        raise UserError(
            "engine.quantization=bitsandbytes: vLLM's loader of it reads one checkpoint, and a "
            "triple has three; take fp8, or a base that is stored quantised (AWQ, GPTQ, FP8)"
        )
    if settings.enforce_eager is False and uses_v2():
        raise UserError(
            "engine.enforce_eager=false: on the model runner V2 a CUDA graph would replay the "
            f"prompts and alphas of one pass; leave it out, or start with {SWITCH}=0"
        )


def _check_member(role: str, spec: ModelSpec, config: Any) -> None:
    """Refuses members of a triple that were not tried in it, or cannot be in it."""
    text = config.get_text_config()
    if text is not config:
        raise UserError(f"{role}: {spec.id} reads more than text; a triple in vLLM is of text")
    odd = [kind for kind in getattr(text, "layer_types", None) or [] if kind not in _FULL]
    if odd:
        raise UserError(
            f"{role}: {spec.id} has layers of the kind {odd[0]}, which a triple in vLLM was not "
            "tried with; use engine=own"
        )
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        raise UserError(
            f"{role}: {spec.id} has a sliding window ({window} tokens), which a triple in vLLM was "
            "not tried with; use engine=own"
        )
    if any(getattr(text, name, None) for name in ("mamba_d_state", "ssm_cfg", "state_size")):
        raise UserError(
            f"{role}: {spec.id} has state-space layers, which a triple in vLLM was not tried with; "
            "use engine=own"
        )
    if role != "base" and getattr(config, "quantization_config", None):
        raise UserError(
            f"{role}: {spec.id} is stored quantised; in vLLM the base alone can be, so give the "
            "checkpoint that it was made of"
        )


def _check_heads(role: str, name: str, config: Any) -> None:
    """Refuses head sizes that vLLM's attention on a CPU does not have."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size and known and size not in known:
        sizes = ", ".join(map(str, known))
        raise UserError(
            f"{role}: {name} has heads of size {size}; vLLM's attention on a CPU takes {sizes}; "
            "use engine=own"
        )


def check_decoding(name: str, decoding: Decoding, settings: EngineSettings) -> None:
    """Refuses a task's settings that this engine cannot keep.

    Args:
        name: whose settings they are, for the message.
        decoding: its settings.
        settings: of the engine.

    Raises:
        UserError: bans with vLLM's sampler, anything but greedy with speculation and our sampler.
    """
    bans = [each for each in ("banned", "banned_first") if getattr(decoding, each)]
    if settings.sampler != OWN and bans:
        raise UserError(f"{name}: {bans[0]}: vLLM's sampler bans no tokens; use engine.sampler=own")
    penalised = decoding.repetition_penalty != 1 or decoding.presence_penalty != 0
    penalised |= decoding.frequency_penalty != 0
    chosen = decoding.temperature > 0 or bans or decoding.choices or penalised
    if settings.speculative is not None and settings.sampler == OWN and chosen:
        raise UserError(
            f"{name}: engine.speculative={settings.speculative} leaves out our sampler, for "
            "vLLM takes no logits processor with it: greedy tasks alone; or engine.sampler=vllm"
        )


def check_combination(own: Combination, alphas: Mapping[str, float], per_request: bool) -> None:
    """Refuses a request's own formula, and its own alpha where all requests have one.

    Args:
        own: what the request asks for.
        alphas: the system's.
        per_request: whether the model runner gives requests an alpha of their own.

    Raises:
        UserError: see above.
    """
    if own.formula is not combine_logits:
        raise UserError(f"formula {name_of(own.formula)} needs engine=own, not engine=vllm")
    if own.alphas != alphas and not per_request:
        raise UserError(f"alpha={own.alphas['alpha']}: {V1_READS_ONE}")


def check_one_prompt(prompts: Iterable[Prompt], place: str) -> None:
    """Refuses prompts that differ from member to member on the model runner V1.

    Args:
        prompts: role -> token ids, each.
        place: names them in the message.

    Raises:
        UserError: the first that differs.
    """
    if uses_v2():
        return
    for prompt in prompts:
        different = _different(prompt)
        if different:
            raise UserError(f"{place}: base and {different} read different prompts; {V1_READS_ONE}")


def _different(prompt: Prompt) -> str | None:
    base: Sequence[int] = list(prompt["base"])
    return next((role for role, ids in prompt.items() if list(ids) != base), None)
