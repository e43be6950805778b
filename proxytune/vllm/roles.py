"""A prompt and an alpha per request, on vLLM's model runner V2.

vLLM counts one prompt per request. Where the members read prompts of their own, that prompt is as
long as the longest member's: the base's ids with filler before them. A member whose prompt is
shorter by d skips the first d of these tokens: its own ids stand at its positions 0, 1, ... and in
the slots that the request's block table gives to these positions. What a member skips in a pass
comes after its real tokens as dummies, whose keys and values the tokens of later passes overwrite.

A request says so in `SamplingParams.extra_args["proxytune"]` (`requests.py`).
"""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from proxytune.vllm.plugin import KEY


@dataclass
class Reading:
    """What one member reads in a pass, where it is not what vLLM has prepared.

    Attributes:
        input_ids: [tokens].
        positions: [tokens].
        back: for each of vLLM's tokens the place of the member's, [tokens].
        slots: where its keys and values go, [tokens].
        layers: the names of its attention layers.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    back: torch.Tensor
    slots: torch.Tensor
    layers: Sequence[str]


@dataclass
class Plan:
    """One pass: each token's alpha, and the readings of members with prompts of their own."""

    alphas: torch.Tensor  # [tokens], float32
    readings: dict[str, Reading] = field(default_factory=dict)


@dataclass
class _Tokens:
    """The tokens of a pass as vLLM has laid them out.

    Attributes:
        starts: of each request's tokens, and the end, [requests + 1].
        counts: tokens of each request, [requests].
        computed: tokens of each request that earlier passes have read, [requests].
        owner: the request of each token, [tokens].
        place: of each token among its request's, [tokens].
    """

    starts: np.ndarray
    counts: np.ndarray
    computed: np.ndarray
    owner: np.ndarray
    place: np.ndarray


class RoleState(DefaultModelState):
    """What the runner keeps of each request: every member's prompt, and alpha.

    A request lives in a slot of the runner until it ends; after a preemption it is added again.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        slots = self.max_num_reqs
        self._roles: tuple[str, ...] = model.roles
        self._default = model.alpha
        self._alpha = np.full(slots, model.alpha, dtype=np.float32)
        self._skips = {role: np.zeros(slots, dtype=np.int64) for role in self._roles}
        self._lengths = {role: np.zeros(slots, dtype=np.int64) for role in self._roles}
        self._differs = {role: np.zeros(slots, dtype=bool) for role in self._roles}
        self._prompts = {
            role: torch.zeros(slots, self.max_model_len, dtype=torch.int32, device=device)
            for role in self._roles
        }
        self._live: set[str] = set()
        self._plan: Plan | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Notes the size of a block; every layer of the members has the same."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = kv_cache_config.kv_cache_groups
        assert len(groups) == 1, "the members' layers share one block table"
        self._block_size = block_tables.block_sizes[0]
        helpers = self._roles[1:]
        self._layers: dict[str, list[str]] = {role: [] for role in self._roles}
        for name in groups[0].layer_names:
            role = next((each for each in helpers if name.startswith(f"{each}.")), "base")
            self._layers[role].append(name)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Takes a request's own prompts and alpha."""
        super().add_request(req_index, new_req_data)
        self._live.add(new_req_data.req_id)
        params = new_req_data.sampling_params
        extra: Mapping[str, Any] = (params and params.extra_args) or {}
        given = extra.get(KEY) or {}
        alpha = extra.get("alpha", given.get("alpha"))  # the first from a client of plain vLLM
        self._alpha[req_index] = self._default if alpha is None else alpha
        whole = list(new_req_data.prefill_token_ids[: new_req_data.prompt_len])
        own = given.get("prompts") or {}
        for role in self._roles:
            ids = own.get(role, whole)
            assert len(ids) <= len(whole), "filler makes the prompt as long as the longest"
            self._skips[role][req_index] = len(whole) - len(ids)
            self._lengths[role][req_index] = len(ids)
            self._differs[role][req_index] = list(ids) != whole
            row = torch.tensor(ids, dtype=torch.int32)
            self._prompts[role][req_index, : len(ids)] = row.to(self.device)

    def remove_request(self, req_id: str) -> None:
        """Forgets a request."""
        super().remove_request(req_id)
        self._live.discard(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Hands the plan to the model's `forward`."""
        return {**super().prepare_inputs(input_batch, req_states), "plan": self._plan}

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plans a pass, and describes to each member's layers what they read: layer -> metadata."""
        common = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            *args,
            **kwargs,
        )
        self._plan = None
        if not self._live.issuperset(input_batch.req_ids[: input_batch.num_reqs]):
            return common  # vLLM measures memory with requests that it makes up
        tokens = _layout(input_batch)
        slots = input_batch.idx_mapping_np[: input_batch.num_reqs]
        alphas = torch.from_numpy(self._alpha[slots][tokens.owner])
        self._plan = Plan(alphas.to(self.device))
        for role in self._roles:
            if not self._differs[role][slots].any():
                continue
            reading, lengths = self._read(role, input_batch, tokens, slots, block_tables[0])
            self._plan.readings[role] = reading
            own = _describe(
                input_batch, tokens, lengths, reading, block_tables, attn_groups, kv_cache_config
            )
            common = common | {name: own[name] for name in reading.layers}
        return common

    def _read(
        self, role: str, input_batch: Any, tokens: _Tokens, slots: np.ndarray, table: torch.Tensor
    ) -> tuple[Reading, np.ndarray]:
        """What a member reads in a pass.

        Args:
            role: the member's.
            input_batch: the pass as vLLM has prepared it.
            tokens: its layout.
            slots: the slot of each request.
            table: the block table of each request, [requests, blocks].

        Returns:
            The reading, and the length of each row after it, [requests].
        """
        owner, place = tokens.owner, tokens.place
        skip, length = self._skips[role][slots], self._lengths[role][slots]
        skipped = np.clip(skip - tokens.computed, 0, tokens.counts)  # of this pass
        first = np.maximum(tokens.computed - skip, 0)
        position = first[owner] + place
        real = place < (tokens.counts - skipped)[owner]
        of_prompt = real & (position < length[owner])
        source = np.where(real, tokens.starts[owner] + place + skipped[owner], 0)
        back = tokens.starts[owner] + np.maximum(place - skipped[owner], 0)

        rows, columns = self._on_device(slots[owner]), self._on_device(position)
        prompt = self._prompts[role][rows, columns.clamp(max=self.max_model_len - 1)]
        written = input_batch.input_ids[: len(owner)][self._on_device(source)]
        ids = torch.where(self._on_device(of_prompt), prompt.to(written.dtype), written)
        ids = ids * self._on_device(real).to(ids.dtype)  # a dummy is token 0
        block = table[self._on_device(owner), columns // self._block_size].long()
        where = block * self._block_size + columns % self._block_size
        reading = Reading(ids, columns, self._on_device(back), where, self._layers[role])
        return reading, first + tokens.counts

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _layout(input_batch: Any) -> _Tokens:
    requests = input_batch.num_reqs
    starts = input_batch.query_start_loc_np[: requests + 1].astype(np.int64)
    counts = np.diff(starts)
    owner = np.repeat(np.arange(requests), counts)
    computed = input_batch.num_computed_tokens_np[:requests].astype(np.int64)
    return _Tokens(starts, counts, computed, owner, np.arange(len(owner)) - starts[owner])


def _describe(
    input_batch: Any,
    tokens: _Tokens,
    lengths: np.ndarray,
    reading: Reading,
    block_tables: Any,
    attn_groups: Any,
    kv_cache_config: Any,
) -> dict[str, Any]:
    """vLLM's attention metadata of a reading, for the layers of all members: layer -> metadata."""
    requests = input_batch.num_reqs
    device = reading.positions.device
    row_lengths = torch.from_numpy(lengths).to(input_batch.seq_lens.dtype)
    starts = torch.from_numpy(tokens.starts).to(torch.int32)
    return build_attn_metadata(
        attn_groups=attn_groups,
        num_reqs=requests,
        num_tokens=len(tokens.owner),
        query_start_loc_gpu=starts.to(device),
        query_start_loc_cpu=starts,
        max_query_len=int(tokens.counts.max()),
        seq_lens=row_lengths.to(device),
        max_seq_len=int(lengths.max()),
        block_tables=[table[:requests] for table in block_tables],
        slot_mappings=reading.slots.unsqueeze(0),
        kv_cache_config=kv_cache_config,
        seq_lens_cpu_upper_bound=row_lengths,
        positions=reading.positions,
        is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
    )
