"""Our sampler inside vLLM: a logits processor leaves the chosen token alone, and vLLM takes it.

vLLM itself decodes greedily then. A request without a sampler (a client of a plain vLLM server) is
left as it is. vLLM's two model runners have two interfaces of processors; `V1` and `V2` are one
processor behind each of them. Both are named to the engine: an entry point would act, and could
fail, in every vLLM of the environment.
"""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from proxytune.engine.penalties import History
from proxytune.engine.sampling import Sampler
from proxytune.errors import UserError
from proxytune.records import finite
from proxytune.vllm.plugin import KEY

# What a client of a plain vLLM server may send as `vllm_xargs`. All members read one prompt there:
# vLLM would share a request's cached prompt with others, which own prompts do not allow.
_FOREIGN = ("expert_prompt", "antiexpert_prompt", "base_prompt", "prompts", KEY)


class Draw(NamedTuple):
    """One row that our sampler chooses for.

    Attributes:
        sampler: `Sampler.to_json`.
        stream: the sample's `sample_stream`.
        prompt: the base's prompt ids, each once; for penalties.
    """

    sampler: str
    stream: int
    prompt: torch.Tensor


@lru_cache(maxsize=256)
def _sampler(text: str) -> Sampler:
    return Sampler.from_dict(json.loads(text))


def draw_of(params: Any) -> Draw | None:
    """What a request says of our sampler; None where vLLM's chooses."""
    given = ((params and params.extra_args) or {}).get(KEY)
    if not given or "sampler" not in given:
        return None
    seen = torch.tensor(given["seen"], dtype=torch.long)
    return Draw(given["sampler"], given["stream"], seen)


def choose(
    logits: torch.Tensor, vocab_size: int, draws: Mapping[int, tuple[Draw, int, list[int]]]
) -> torch.Tensor:
    """Chooses the next tokens of some rows, and forbids these rows every other token.

    Args:
        logits: [rows, vocab], changed in place.
        vocab_size: entries that count.
        draws: row -> its draw, how many tokens it has written, and which (empty where the sampler
            does not look back).

    Raises:
        UserError: a row has no token to choose.
    """
    groups: dict[str, list[int]] = {}
    for row, (draw, _, _) in draws.items():
        groups.setdefault(draw.sampler, []).append(row)
    for text, rows in groups.items():
        sampler, index = _sampler(text), torch.tensor(rows, device=logits.device)
        given = [draws[row] for row in rows]
        histories = [History(draw.prompt, tokens) for draw, _, tokens in given]
        chosen = sampler.choose(
            logits[index, :vocab_size],
            [draw.stream for draw, _, _ in given],
            [position for _, position, _ in given],
            histories if sampler.looks_back else [],
        )
        if bool((chosen < 0).any()):
            raise UserError(
                "a model gives no probabilities (a logit is NaN or infinite, or no token is "
                "allowed); load it in another dtype (bfloat16 or float32), and check its weights"
            )
        logits[index] = -torch.inf
        logits[index, chosen] = 0.0
    return logits


def _check(params: Any, own_alpha: bool) -> None:
    """Refuses what a client of a plain vLLM server cannot have; vLLM answers with status 400.

    Args:
        params: vLLM's SamplingParams.
        own_alpha: whether this runner gives requests an alpha of their own.

    Raises:
        UserError: an own prompt, an own alpha on the runner V1, an alpha that is no number.
    """
    given = dict(params.extra_args or {})
    ours = given.get(KEY)
    if isinstance(ours, Mapping):  # from this package: nested values do not come over HTTP
        given = {name: value for name, value in given.items() if name != KEY}
    for name in _FOREIGN:
        if name in given:
            raise UserError(
                f"{name}: a plain vLLM server gives all members one prompt; `proxytune serve "
                "engine=vllm` renders one for each"
            )
    if "alpha" not in given:
        return
    finite("alpha", given["alpha"])
    if not own_alpha:
        raise UserError(
            "alpha: vLLM's model runner V1 has one alpha for all requests; start the server with "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _vocab_size(vllm_config: Any) -> int:
    return int(vllm_config.additional_config[KEY]["vocab_size"])


class V1(LogitsProcessor):
    """The processor for the model runner V1; it is told which rows come, go and move."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab_size = _vocab_size(vllm_config)
        self._rows: dict[int, tuple[Draw, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `_check`."""
        _check(sampling_params, own_alpha=False)

    def is_argmax_invariant(self) -> bool:
        """False: vLLM must not leave it out for greedy rows."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the rows of the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            draw = draw_of(params)
            self._rows.pop(row, None)
            if draw is not None:
                self._rows[row] = (draw, output)
        for source, target, how in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if how == MoveDirectionality.SWAP and other is not None:
                self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """See `choose`; `output` is vLLM's own list, which grows."""
        draws = {row: (draw, len(out), out) for row, (draw, out) in self._rows.items()}
        return choose(logits, self._vocab_size, draws)


class V2(LogitsProcessorV2):
    """The processor for the model runner V2; it looks its rows up in the runner's slots."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._vocab_size = _vocab_size(vllm_config)
        self._states = req_states
        self._slots: dict[int, Draw | None] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `_check`."""
        _check(sampling_params, own_alpha=True)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes a slot's draw; returns whether there is one."""
        self._slots[req_idx] = draw_of(sampling_params)
        return self._slots[req_idx] is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """See `choose`."""
        states, draws = self._states, {}
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            draw, length = self._slots.get(slot), int(ctx.seq_lens_upper_bound_np[row])
            if draw is None or length < int(states.prefill_len.np[slot]):
                continue  # the prompt is not read to its end: vLLM throws this choice away
            start = int(states.prompt_len.np[slot])
            written: list[int] = []
            if _sampler(draw.sampler).looks_back:
                written = states.all_token_ids.gpu[slot, start:length].tolist()
            draws[row] = (draw, length - start, written)
        return choose(logits, self._vocab_size, draws)
