"""Models for benchmarks: random Llamas of any size, and triples whose agreement can be set.

Benchmarks must run where no weights can be downloaded, and the cost of a decoding step does not
depend on the weights. The acceptance of speculative decoding does (how often the triple chooses
the expert's guess); `agreeing_triple` makes models with a given acceptance.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A Llama's size. Heads are 64 wide in our own shapes and 128 in those of Llama-2.

    Attributes:
        hidden, layers, heads, inner: width, depth, attention heads, width of the MLP.
        vocab: rows of the (untied) embeddings.
    """

    hidden: int
    layers: int
    heads: int
    inner: int
    vocab: int = 8192

    def config(self, **more: object) -> LlamaConfig:
        """The transformers configuration, without an end-of-sequence token."""
        settings: dict[str, object] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }
        return LlamaConfig(**settings | more)  # pyright: ignore[reportArgumentType]


LLAMA_13B = Shape(5120, 40, 40, 13824, 32000)
LLAMA_7B = Shape(4096, 32, 32, 11008, 32000)
LLAMA_1B = Shape(2048, 16, 16, 5504, 32000)
SHAPE_100M = Shape(768, 12, 12, 2048)
SHAPE_30M = Shape(512, 8, 8, 1376)
SHAPE_15M = Shape(384, 6, 6, 1024)
SHAPE_10M = Shape(256, 8, 4, 688)
SHAPE_7M = Shape(256, 4, 4, 688)
SHAPE_3M = Shape(128, 6, 2, 344)
SHAPE_TINY = Shape(128, 2, 2, 96, 2048)
SHAPE_TINIER = Shape(64, 1, 1, 48, 2048)


@dataclass(frozen=True)
class Triple:
    """Three loaded models."""

    base: LlamaForCausalLM
    expert: LlamaForCausalLM
    antiexpert: LlamaForCausalLM

    @property
    def members(self) -> tuple[LlamaForCausalLM, LlamaForCausalLM, LlamaForCausalLM]:
        """The three, largest first."""
        return self.base, self.expert, self.antiexpert


def random_llama(
    shape: Shape, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama with random weights, made on its device (26 GB of 13B never pass through the CPU)."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_triple(
    base: Shape, small: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Triple:
    """A triple of random models, to measure costs that do not depend on the text."""
    return Triple(
        random_llama(base, 0, device, dtype),
        random_llama(small, 1, device, dtype),
        random_llama(small, 2, device, dtype),
    )


def agreeing_triple(
    base: Shape,
    small: Shape,
    acceptance: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Triple:
    """A triple of realistic cost whose expert guesses the triple's greedy token with `acceptance`.

    The base computes the antiexpert's function in its first dimensions and layers. Its other
    weights take their time and write nothing to the residual stream. Noise on its output layer
    sets the size of base - antiexpert, and so of proxy - expert.

    Args:
        base: the base's shape.
        small: the shape of expert and antiexpert.
        acceptance: the share of right guesses.
        device: of the models.
        dtype: of the models.
    """
    antiexpert = random_llama(small, 1, device, dtype)
    _speak_clearly(antiexpert)
    expert = random_llama(small, 1, device, dtype)
    expert.load_state_dict(antiexpert.state_dict())
    generator = torch.Generator().manual_seed(2)
    head = expert.lm_head.weight
    change = torch.randn(2, *head.shape, generator=generator).to(head)
    noise = head.std() * change[0]
    head += head.std() * change[1]
    size = _noise_for(acceptance, expert, antiexpert, noise)
    wide = widened(antiexpert, base)
    wide.lm_head.weight[:, : small.hidden] += size * noise
    return Triple(wide, expert, antiexpert)


def widened(narrow: LlamaForCausalLM, shape: Shape) -> LlamaForCausalLM:
    """A model of `shape` with the logits of `narrow`, up to rounding."""
    small = narrow.config
    hidden, inner = small.hidden_size, small.intermediate_size
    share = hidden / shape.hidden  # of the dimensions that are not zero
    if shape.hidden // shape.heads != hidden // small.num_attention_heads:
        raise UserError("both models must have heads of the same width")
    wide = random_llama(replace(shape, vocab=small.vocab_size), 3, str(narrow.device), narrow.dtype)
    # The mean square over all dimensions is `share` times that over the first ones.
    for module in wide.modules():
        norm: Any = module
        if hasattr(norm, "variance_epsilon"):
            norm.variance_epsilon = small.rms_norm_eps * share

    def put(into: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> None:
        into.zero_()
        into[tuple(slice(n) for n in weight.shape)] = weight * scale

    put(wide.model.embed_tokens.weight, narrow.model.embed_tokens.weight)
    put(wide.model.norm.weight, narrow.model.norm.weight, share**0.5)
    put(wide.lm_head.weight, narrow.lm_head.weight)
    layers: Any = wide.model.layers
    sources: Any = narrow.model.layers
    for index, layer in enumerate(layers):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if index >= small.num_hidden_layers:
            continue
        source = sources[index]
        put(layer.input_layernorm.weight, source.input_layernorm.weight, share**0.5)
        put(
            layer.post_attention_layernorm.weight,
            source.post_attention_layernorm.weight,
            share**0.5,
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            put(getattr(layer.self_attn, name).weight, getattr(source.self_attn, name).weight)
        for name in ("gate_proj", "up_proj"):
            rows = getattr(layer.mlp, name).weight
            rows[:inner, :hidden] = getattr(source.mlp, name).weight
        put(layer.mlp.down_proj.weight, source.mlp.down_proj.weight)
    return wide


def _speak_clearly(model: LlamaForCausalLM) -> None:
    """Changes a random model so that each token has one clear successor, without short cycles.

    The greedy text of plain random weights soon repeats three or four tokens, and so does the
    acceptance. Here each token favours another one; all tokens form one long cycle. The other
    logits have a standard deviation of 3.
    """
    width = model.config.hidden_size
    embeddings = model.model.embed_tokens.weight
    embeddings *= 1 / embeddings.std()
    model.lm_head.weight *= 3 / (model.lm_head.weight.std() * width**0.5)
    generator = torch.Generator().manual_seed(6)
    cycle = torch.randperm(len(embeddings), generator=generator).to(embeddings.device)
    favoured = cycle.roll(-1)
    model.lm_head.weight[favoured] += embeddings[cycle] / width**0.5


@torch.inference_mode()
def _noise_for(
    acceptance: float,
    expert: LlamaForCausalLM,
    antiexpert: LlamaForCausalLM,
    noise: torch.Tensor,
) -> float:
    """The size of the noise at which expert and triple agree on the greedy token with `acceptance`.

    Found by bisection over a text that the expert wrote, so that the contexts are realistic.
    """
    from bench_workloads import lockstep  # plain decoding, used here to write that text

    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(expert.config.vocab_size, (8, 8), generator=generator)
    written = lockstep([expert], prompts.tolist(), 120)
    text = torch.cat([prompts.to(written.device), written], dim=1)
    expert_logits = expert(text).logits[:, 8:]
    states = antiexpert.model(text).last_hidden_state[:, 8:]
    shift = states @ noise.T
    guess = expert_logits.argmax(-1)

    def agreement(size: float) -> float:
        return float(((expert_logits + size * shift).argmax(-1) == guess).float().mean())

    low, high = 0.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement(middle) > acceptance else (low, middle)
    return low
