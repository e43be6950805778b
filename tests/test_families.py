"""Every family of causal language models decodes as brute force does, with a cache or without.

A few of them always, all of them under `-m slow` (a second each). docs/models.md lists them.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedConfig

import proxytune
from proxytune.members.cached import CachedModel
from proxytune.members.recomputed import RecomputedModel

VOCAB = 120
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = EXPERTS | {"moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def rope(**more: Any) -> dict[str, Any]:
    first = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": first | more}


# name of the configuration class, then a note behind a space: what differs from SHAPE
CACHED: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "BioGpt": {},
    "CodeGen": GPT2_SHAPE | {"rotary_dim": 4},
    "Cohere": {},
    "Cohere2": WINDOW | {"num_hidden_layers": 4},
    "DeepseekV2": LATENT | {"n_group": 1},
    "DeepseekV3": LATENT | {"n_group": 2},
    "DiffLlama": {},
    "Doge": {},
    "Ernie4_5": HEAD,
    "Exaone4": WINDOW | {"num_hidden_layers": 4},
    "Falcon new": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "GPT2": GPT2_SHAPE,
    "GPTBigCode": GPT2_SHAPE,
    "GPTJ": GPT2_SHAPE | {"rotary_dim": 4},
    "GPTNeoX": {},
    "Gemma": HEAD,
    "Gemma2": HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "Gemma3Text": HEAD | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "Glm": HEAD,
    "Glm4": HEAD,
    "GptOss": HEAD | WINDOW | LOCAL_EXPERTS,
    "Granite": {},
    "Helium": HEAD,
    "HunYuanDenseV1": HEAD,
    "Llama": {},
    "Llama linear": rope(rope_type="linear"),
    "Llama llama3": rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "Llama yarn": rope(rope_type="yarn"),
    "Mistral window": WINDOW,
    "Mixtral": LOCAL_EXPERTS,
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "Nemotron": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": WINDOW | {"num_hidden_layers": 4},
    "Olmoe": EXPERTS,
    "Persimmon": {},
    "Phi": {"num_key_value_heads": 4},
    "Phi3": {},
    "Qwen2": {},
    "Qwen2 window": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen2Moe": SMALL_EXPERTS | {"shared_expert_intermediate_size": 16},
    "Qwen3": HEAD,
    "Qwen3Moe": HEAD | SMALL_EXPERTS,
    "SeedOss": HEAD,
    "SmolLM3": {"num_hidden_layers": 4},
    "StableLm": {},
    "Starcoder2": WINDOW,
    "VaultGemma": HEAD | WINDOW,
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon alibi": {"alibi": True},
    "GPTNeo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "Jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "Llama4Text": HEAD
    | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "Mamba": MAMBA,
    "Mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "MiniMax": HEAD | {"num_local_experts": 2},
    "Qwen3Next": HEAD
    | SMALL_EXPERTS
    | LINEAR
    | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    "RecurrentGemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 256},
}
ALWAYS = {"Cohere2", "Falcon new", "Gemma2", "GptOss", "Mixtral", "OPT", "Olmo2", "Phi3", "Rwkv"}
OWN_NAMES = {"GPT", "Mamba", "Mpt", "CodeGen"}  # configurations that take no common shape


def config_of(name: str) -> PreTrainedConfig:
    family = name.partition(" ")[0]
    own = any(family.startswith(each) for each in OWN_NAMES) and family != "GPTNeoX"
    shape = {"vocab_size": VOCAB} if own else SHAPE
    if family == "GPTNeo":
        shape = shape | {"hidden_size": 32, "max_position_embeddings": 256}
    more = (CACHED | RECOMPUTED)[name]
    ids = {"pad_token_id": 0, "eos_token_id": None}
    return getattr(transformers, f"{family}Config")(**shape | more | ids)


def make(config: PreTrainedConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # opinions: greedy choices do not hang on rounding
    return model


@torch.no_grad()
def brute_force(models: list[Any], prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        rows = [model(torch.tensor([ids]), use_cache=False).logits[0, -1] for model in models]
        ids.append(int((rows[0] + rows[1] - rows[2]).argmax()))
    return ids[len(prompt) :]


def parameters() -> list[Any]:
    names = [*CACHED, *RECOMPUTED]
    return [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.slow]) for n in names]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", parameters())
def test_a_triple_of_the_family_writes_what_brute_force_writes(name):
    if name == "Doge" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers' own Doge looks ahead before 5.18")
    models = [make(config_of(name), seed) for seed in range(3)]
    prompts = [list(range(5, 5 + 3 * length, 3)) for length in (1, 3, 11, 20)]
    want = [brute_force(models, prompt, 7) for prompt in prompts]
    generator = proxytune.load(*models)
    kind = CachedModel if name in CACHED else RecomputedModel
    assert all(type(member) is kind for member in generator.system.members.values())
    for drafted in (False, 3):
        got = generator.generate(prompts, max_new_tokens=7, batch_size=3, speculative=drafted)
        assert [each.token_ids for each in got] == want


def test_the_documentation_lists_them():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    cached, _, rest = text.partition("## Without a cache")
    for listed, names in ((cached, CACHED), (rest, RECOMPUTED)):
        for name in names:
            assert re.search(rf"\b{re.escape(name.partition(' ')[0])}\b", listed), name


def test_what_looks_ahead_is_refused():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(ValueError, match="looks ahead"):
        proxytune.load(make(config, 0))


def test_an_encoder_decoder_is_refused_by_its_configuration(tmp_path):
    transformers.T5Config(vocab_size=VOCAB).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(t5\) is no causal language model"):
        proxytune.load(tmp_path)
