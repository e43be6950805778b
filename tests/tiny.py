"""Tiny random models and tokenizers: real architectures, a few thousand weights, no downloads.

model = tiny_model("llama", seed=0)
save_tiny(tmp_path / "base", arch="llama", seed=0)      # a folder that from_pretrained loads
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 300
ARCHS = ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "mistral_sliding")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRAINING_TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Question: What is the capital of France?\nAnswer: Paris. The answer is 42.",
)


def tiny_config(
    arch: str = "llama", *, vocab: int = VOCAB, hidden: int = 32, layers: int = 2, **more: Any
) -> PreTrainedConfig:
    """A configuration of one of `ARCHS`; `more` goes to the configuration class."""
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if arch == "llama":
        return LlamaConfig(**shape | more)
    if arch == "qwen2":
        return Qwen2Config(**shape | more)
    if arch == "qwen3":
        return Qwen3Config(**shape | {"head_dim": hidden // 4} | more)
    if arch == "gemma3":  # one layer in two sees a window of 8 tokens only
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
        own = {"head_dim": hidden // 4, "sliding_window": 8, "layer_types": kinds}
        return Gemma3TextConfig(**shape | own | more)
    if arch == "mistral_sliding":
        return MistralConfig(**shape | {"sliding_window": 8} | more)
    if arch == "gpt2":
        gpt2 = {
            "vocab_size": vocab,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        return GPT2Config(**gpt2 | more)
    raise ValueError(f"no tiny model of architecture {arch!r}; there are {', '.join(ARCHS)}")


def tiny_model(
    arch: str = "llama",
    seed: int = 0,
    *,
    vocab: int = VOCAB,
    scale: float = 10.0,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> PreTrainedModel:
    """A random model in eval mode, the same for the same arguments.

    Args:
        arch: one of `ARCHS`.
        seed: of the weights.
        vocab: rows of the embedding (larger than the tokenizer's: padded logits).
        scale: the factor on the weights of matrices; above 1 the model has opinions, so that
            greedy choices do not hang on rounding.
        dtype: of the weights.
        more: goes to the configuration (hidden=, layers=, ...).
    """
    config = tiny_config(arch, vocab=vocab, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(dtype).eval()


def tiny_tokenizer(
    vocab: int = VOCAB, *, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with exactly `vocab` entries: 0 <pad>, 1 <s>, 2 </s>, ..."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TRAINING_TEXT, trainer)
    if core.get_vocab_size() < vocab:
        core.add_tokens([f"<extra_{i}>" for i in range(vocab - core.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_tiny(
    folder: Path,
    *,
    arch: str = "llama",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **more: Any,
) -> Path:
    """Writes a tiny model and its tokenizer as from_pretrained expects them; returns the folder."""
    tiny_model(arch, seed, **more).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def sentencepiece_decoder() -> decoders.Decoder:
    """Pieces to text as Llama-2's tokenizer does it: bars for spaces, and byte tokens."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
