"""A chat model on this machine, in place of a judge behind an API (see tasks/alpaca_judge.py)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from proxytune.loading.prompting import PromptFormat, encode, render_messages
from tasks.judge import LocalJudge


@dataclass(frozen=True)
class LocalChat(LocalJudge):
    """Answers an annotator's prompts greedily; answers have the form of OpenAI's completions.

    Attributes:
        format: arguments of `PromptFormat` (proxytune/loading/prompting.py); by default the
            tokenizer's own chat template.
    """

    format: dict[str, Any] = field(default_factory=lambda: {"kind": "chat"}, hash=False)

    def identity(self) -> dict[str, Any]:
        """Everything that an answer depends on besides the prompt."""
        return super().identity() | {"format": self.format}

    def answers(
        self, settings: dict[str, Any]
    ) -> Callable[[list[str]], Iterator[dict[str, dict[str, Any]]]]:
        """Returns a function that answers prompts and yields blocks of prompt -> choice.

        Args:
            settings: of an annotator. `max_tokens`, `logprobs` and `top_logprobs` are used, the
                temperature is not.
        """

        def judge(prompts: list[str]) -> Iterator[dict[str, dict[str, Any]]]:
            with self._loaded(AutoModelForCausalLM) as (model, tokenizer, device):
                ids = [self._encode(prompt, tokenizer) for prompt in prompts]
                for rows in self._batches(prompts, [len(row) for row in ids]):
                    choices = _answer([ids[i] for i in rows], model, tokenizer, device, settings)
                    yield {prompts[i]: choice for i, choice in zip(rows, choices, strict=True)}

        return judge

    def _encode(self, prompt: str, tokenizer: Any) -> list[int]:
        from alpaca_eval.utils import prompt_to_chatml

        messages = [{"role": "user", "content": prompt}]
        if prompt.startswith("<|im_start|>"):
            messages = prompt_to_chatml(prompt)
        return encode(render_messages(messages, PromptFormat(**self.format), tokenizer), tokenizer)


@torch.inference_mode()
def _answer(
    ids: list[list[int]], model: Any, tokenizer: Any, device: str, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Greedy answers to one batch of encoded prompts."""
    width = max(len(row) for row in ids)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(_eos_ids(model)), 0)
    inputs = torch.full((len(ids), width), pad)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for i, row in enumerate(ids):
        inputs[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    wants_log_probs = bool(settings.get("logprobs"))
    made = model.generate(
        input_ids=inputs.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=int(settings.get("max_tokens", 2048)),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=wants_log_probs,
    )
    written = made.sequences[:, width:]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    choices: list[dict[str, Any]] = [{"text": text.strip() or " "} for text in texts]
    if wants_log_probs:
        count = int(settings.get("top_logprobs", 1))
        ends = torch.tensor([pad, *_eos_ids(model)], device=written.device)
        for row, choice in enumerate(choices):
            ended = torch.isin(written[row], ends).nonzero()
            length = max(1, int(ended[0])) if len(ended) else len(made.logits)
            steps = [logits[row].float().log_softmax(-1) for logits in made.logits[:length]]
            choice["logprobs"] = {"content": [_top(step, count, tokenizer) for step in steps]}
    return choices


def _eos_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _top(log_probs: torch.Tensor, count: int, tokenizer: Any) -> dict[str, Any]:
    best = log_probs.topk(count)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [{"token": tokenizer.decode([index]), "logprob": value} for index, value in pairs]
    return top[0] | {"top_logprobs": top}
