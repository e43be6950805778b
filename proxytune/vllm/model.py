"""Base, expert and antiexpert as one model of vLLM.

The members are vLLM's own models. `forward` gives their hidden states side by side,
`compute_logits` combines their logits; so all that vLLM does with a model (paged attention, chunked
prefill, prefix caching, preemption, tensor parallelism) it does with the triple.
"""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model

from proxytune.proxy import SharedEnd, combine_logits
from proxytune.vllm.plugin import KEY

HELPERS = ("expert", "antiexpert")


class ProxyTunedForCausalLM(nn.Module):
    """A triple; or one model whose logits are cut to its tokenizer's vocabulary.

    Everything that is not vLLM's own comes from `additional_config["proxytune"]`:

        architectures  of the base, which `hf_overrides` has replaced by this class
        vocab_size     entries of the logits that count
        expert, antiexpert  {"id", "revision"} each; neither, for one model
        alpha          scale on (expert - antiexpert)
        end            `SharedEnd.to_dict()`; null for none
    """

    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        told: Any = vllm_config.additional_config
        given = told[KEY]
        self.alpha = float(given.get("alpha", 1.0))
        self.vocab_size = int(given["vocab_size"])
        self.end = _end(given.get("end"), self.vocab_size)
        self.config = vllm_config.model_config.hf_config
        config = copy.deepcopy(self.config)
        config.architectures = list(given["architectures"])
        # Without a prefix: a quantised checkpoint names the layers that it leaves as they are.
        self.base: Any = initialize_model(
            vllm_config=vllm_config.with_hf_config(config, list(config.architectures)),
            prefix=prefix,
        )
        self.roles = ("base", *(role for role in HELPERS if role in given))
        self._widths = [vllm_config.model_config.get_hidden_size()]
        self.secondary_weights = []
        for role in self.roles[1:]:
            named = given[role]
            model_config = _member_config(vllm_config.model_config, named)
            # `replace` runs __post_init__, which derives the member's own quantisation.
            own = replace(vllm_config, model_config=model_config, quant_config=None)
            member = initialize_model(vllm_config=own, prefix=role, model_config=model_config)
            self.add_module(role, member)
            self.secondary_weights.append(
                DefaultModelLoader.Source(named["id"], named.get("revision"), prefix=f"{role}.")
            )
            self._widths.append(model_config.get_hidden_size())
        self.per_request = vllm_config.use_v2_model_runner and len(self.roles) > 1
        if self.per_request:
            # The last columns of a token's hidden states hold its alpha, bit for bit, because
            # 16-bit types would round it.
            self._widths.append(4 // vllm_config.model_config.dtype.itemsize)
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors

    @classmethod
    def get_model_state_cls(cls) -> type:
        """vLLM's hook for what the runner V2 keeps of each request."""
        from proxytune.vllm.roles import RoleState

        return RoleState

    def members(self) -> Iterator[tuple[str, Any]]:
        """Role and model of each member."""
        for role in self.roles:
            yield role, getattr(self, role)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base's embeddings; vLLM asks every model of text for them."""
        return self.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        plan: Any = None,
    ) -> torch.Tensor:
        """The members' hidden states side by side, [tokens, sum of widths].

        Args:
            input_ids: [tokens].
            positions: [tokens].
            intermediate_tensors: None; there is one stage.
            inputs_embeds: None; a prompt is text.
            plan: a `roles.Plan`; None where all members read the same tokens and no request has
                an alpha of its own.
        """
        hidden = []
        for role, member in self.members():
            own = plan.readings.get(role) if plan is not None else None
            if own is None:
                hidden.append(member(input_ids, positions))
                continue
            slots = get_forward_context().slot_mapping
            for layer in own.layers:
                slots[layer] = own.slots
            hidden.append(member(own.input_ids, own.positions)[own.back])
        if self.per_request:
            hidden.append(self._alpha_columns(plan, hidden[0]))
        return torch.cat(hidden, dim=-1)

    def _alpha_columns(self, plan: Any, like: torch.Tensor) -> torch.Tensor:
        """Each token's alpha as columns of the hidden states' dtype, [tokens, 1 or 2]."""
        alphas = torch.full((len(like), 1), self.alpha, dtype=torch.float32, device=like.device)
        if plan is not None:
            alphas[: len(plan.alphas), 0] = plan.alphas
        return alphas.view(like.dtype)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The triple's logits, [tokens, the base's vocabulary], float32.

        Tokens beyond the shared vocabulary have minus infinity. None on the processes of a
        tensor-parallel group that do not choose.
        """
        parts = hidden_states.split(self._widths, dim=-1)
        logits = {
            role: member.compute_logits(part.contiguous())
            for (role, member), part in zip(self.members(), parts, strict=False)
        }
        if logits["base"] is None:
            return None
        out = logits["base"].new_full(logits["base"].shape, -torch.inf, dtype=torch.float32)
        cut = {role: self._shared(role, each) for role, each in logits.items()}
        if len(self.roles) == 1:
            out[:, : self.vocab_size] = cut["base"]
            return out
        alpha: float | torch.Tensor = self.alpha
        if self.per_request:
            alpha = parts[-1].contiguous().view(torch.float32)
        out[:, : self.vocab_size] = combine_logits(**cut, alpha=alpha)
        return out

    def _shared(self, role: str, logits: torch.Tensor) -> torch.Tensor:
        if self.end is not None:
            return self.end.merge(role, logits)
        return logits[:, : self.vocab_size]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Gives every member its weights; the loader reads the base's first, then the helpers'."""
        loaded = set()
        for role, part in groupby(weights, key=lambda item: _role_of(item[0])):
            skip = 0 if role == "base" else len(role) + 1
            own = ((name[skip:], weight) for name, weight in part)
            loaded |= {f"{role}.{name}" for name in getattr(self, role).load_weights(own)}
        return loaded


def _role_of(name: str) -> str:
    head = name.split(".", 1)[0]
    return head if head in HELPERS else "base"


def _member_config(own: ModelConfig, named: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a helper: its own checkpoint, everything else as the base's."""
    return ModelConfig(
        model=named["id"],
        revision=named.get("revision"),
        tokenizer=own.tokenizer,
        skip_tokenizer_init=own.skip_tokenizer_init,
        trust_remote_code=own.trust_remote_code,
        dtype=own.dtype,
        seed=own.seed,
        enforce_eager=own.enforce_eager,
    )


def _end(given: Mapping[str, Any] | None, vocab_size: int) -> SharedEnd | None:
    if given is None:
        return None
    return SharedEnd(given["token"], {r: tuple(ids) for r, ids in given["of"].items()}, vocab_size)
