"""Adapters: those that fit act as their merged weights; the others are refused before weights.

Each refusal fails on 538a493: there the adapter was loaded in part (with a Python warning), or the
run ended in a RuntimeError after the weights had been read.
"""

import json
import warnings
from functools import cache

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer

import proxytune
from proxytune.errors import UserError
from proxytune.loading import adapters as adapters_module
from proxytune.loading.build import shares_weights
from proxytune.loading.load import check_triple, load_member, load_tokenizer
from proxytune.loading.spec import ModelSpec
from proxytune.provenance import model_facts

PROMPTS = [[1, 40, 41], [1, 9, 7]]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 1), ("antiexpert", 3)):
        save_tiny(root / name, seed=seed)
    return root


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a model's weights is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    for module in ("proxytune.loading.load", "proxytune.loading.adapters"):
        monkeypatch.setattr(f"{module}.AutoModelForCausalLM.from_pretrained", refuse)


@cache
def plain_model(seed):
    """A tiny model that no test changes."""
    return tiny_model("llama", seed)


def trained(config, *, model=None):
    """A tiny model with an adapter whose tensors are all random."""
    adapted = get_peft_model(model or tiny_model("llama", 3), config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapted


def saved(path, config=None, **more):
    config = config or LoraConfig(r=4, target_modules=TARGETS, lora_alpha=16, task_type="CAUSAL_LM")
    adapted = trained(config, **more)
    adapted.save_pretrained(path, save_embedding_layers=False)
    return adapted


def edited(path, change):
    """Changes the tensors of a saved adapter: name -> tensor, or None to leave it out."""
    file = path / "adapter_model.safetensors"
    changed = [change(name, tensor) for name, tensor in load_file(file).items()]
    save_file(dict(pair for pair in changed if pair is not None), file)


def spec_of(folder, path, model="antiexpert"):
    return ModelSpec(str(folder / model), adapter=str(path))


def refused(folder, path, match, model="antiexpert"):
    with pytest.raises(UserError, match=match) as caught:
        check_triple({"expert": spec_of(folder, path, model)})
    assert "\n" not in str(caught.value)


# -- adapters that do not arrive --------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model.model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace("lora_A", "lora_A.other").replace("lora_B", "lora_B.other"),
    ],
)
def test_names_of_no_module(folder, tmp_path, no_weights, rename):
    saved(tmp_path)
    edited(tmp_path, lambda name, tensor: (rename(name), tensor))
    refused(folder, tmp_path, r"does not fit.*12 of its 12 tensors belong to no module.*q_proj")


def test_another_width(folder, tmp_path, no_weights):
    saved(tmp_path, model=tiny_model("llama", 3, hidden=64))
    refused(folder, tmp_path, r"lora_A.weight is 4 x 128, the model wants 4 x 64.*another size")


def test_another_depth(folder, tmp_path, no_weights):
    saved(tmp_path, model=tiny_model("llama", 3, layers=3))
    refused(folder, tmp_path, r"6 of its 18 tensors belong to no module.*layers\.2\.")


def test_another_architecture(folder, tmp_path, no_weights):
    config = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    saved(tmp_path, config, model=tiny_model("gpt2", 3))
    refused(folder, tmp_path, r"does not fit.*[Tt]arget modules.*c_attn")


def test_another_rank_than_the_configuration(folder, tmp_path, no_weights):
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    refused(folder, tmp_path, r"is 4 x 64, the model wants 8 x 64.*another rank")


def test_target_modules_without_tensors(folder, tmp_path, no_weights):
    saved(tmp_path)
    edited(tmp_path, lambda name, tensor: None if "v_proj" in name else (name, tensor))
    refused(folder, tmp_path, r"4 of 12 that adapter_config.json asks for are missing.*v_proj")


def test_tensors_that_the_configuration_does_not_ask_for(folder, tmp_path, no_weights):
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text()) | {"target_modules": ["q_proj"]}
    file.write_text(json.dumps(told))
    refused(folder, tmp_path, r"8 of its 12 tensors belong to no module of the model")


def test_resized_embeddings(folder, tmp_path, no_weights):
    model = tiny_model("llama", 3)
    model.resize_token_embeddings(303, mean_resizing=False)
    adapted = trained(LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"), model=model)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    refused(folder, tmp_path, r"is 303 x 32, the model wants 300 x 32.*resized.*merge")


def test_retrained_embeddings_of_another_size(folder, tmp_path, no_weights):
    config = LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    saved(tmp_path, config, model=tiny_model("llama", 3, vocab=310))
    refused(folder, tmp_path, r"embed_tokens.* is 310 x 32, the model wants 300 x 32")


@pytest.mark.thinned(1)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_adapter_at_its_initial_value(folder, tmp_path, no_weights, suffix):
    """Also one in PyTorch's own file format."""
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama", 3), config).save_pretrained(tmp_path)
    if suffix == ".bin":
        as_bin(tmp_path)
    refused(folder, tmp_path, r"changes nothing: all 6 of its lora_B are zero.*before it was tra")


@pytest.mark.parametrize("how", ["lora_alpha of 0", "lora_A of zeros", "either of zeros"])
def test_an_adapter_that_adds_zero(folder, tmp_path, no_weights, how):
    """Fails on 538a493, which checks no values."""
    alpha = 0 if how == "lora_alpha of 0" else 16
    config = LoraConfig(r=4, target_modules=TARGETS, lora_alpha=alpha, task_type="CAUSAL_LM")
    saved(tmp_path, config)
    if how == "lora_A of zeros":
        edited(tmp_path, lambda name, t: (name, t * 0 if "lora_A" in name else t))
    if how == "either of zeros":
        zero = {"layers.0": "lora_A", "layers.1": "lora_B"}
        edited(
            tmp_path,
            lambda name, t: (name, t * (not any(k in name and v in name for k, v in zero.items()))),
        )
    refused(folder, tmp_path, "changes nothing: .*(lora_alpha|lora_A)")


def as_bin(path):
    file = path / "adapter_model.safetensors"
    torch.save(load_file(file), path / "adapter_model.bin")
    file.unlink()


def test_some_modules_at_their_initial_value_are_named(folder, tmp_path, caplog):
    saved(tmp_path)
    edited(tmp_path, lambda name, t: (name, t * 0 if "layers.1" in name and "_B" in name else t))
    check_triple({"expert": spec_of(folder, tmp_path)})
    assert "3 of 6 modules of the adapter" in caplog.text
    assert "layers.1.self_attn.q_proj.lora_B.weight" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            alpha_pattern={"q_proj": 0},
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["ia3", "loha", "lora whose scales are zero"],
)
def test_an_adapter_of_another_kind_at_its_initial_value(folder, tmp_path, config):
    """Fails on fadf341: the zeros of LoRA alone were looked for."""
    get_peft_model(tiny_model("llama", 3), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"changes nothing: .* the same logits without it"):
        load_member(spec_of(folder, tmp_path))


def test_an_adapter_that_is_about_one_token_alone(folder, tmp_path):
    config = TrainableTokensConfig(token_indices=[77], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama", 3), config).save_pretrained(tmp_path)
    edited(tmp_path, lambda name, t: (name, t + 1))
    assert load_member(spec_of(folder, tmp_path)).model is not None


def test_a_file_of_more_than_tensors(folder, tmp_path, no_weights):
    """Fails on fadf341 with an AttributeError."""
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    for held in ({"state_dict": tensors, "step": 3}, [*tensors.values()]):
        torch.save(held, tmp_path / "adapter_model.bin")
        refused(folder, tmp_path, r"adapter_model.bin holds more than tensors by their names")


def test_an_adapter_of_nan(folder, tmp_path, no_weights):
    saved(tmp_path)
    edited(tmp_path, lambda name, tensor: (name, tensor * torch.nan))
    refused(folder, tmp_path, "holds NaN or infinity in base_model")


def test_files_that_cannot_be_read(folder, tmp_path, no_weights):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    refused(folder, tmp_path, "adapter_model.safetensors cannot be read")
    file.unlink()
    refused(folder, tmp_path, "holds no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    refused(folder, tmp_path, "adapter_model.bin cannot be read")


def test_kinds_that_are_no_weights(folder, tmp_path, no_weights):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_model("llama", 3), config).save_pretrained(tmp_path)
    refused(folder, tmp_path, "is a PROMPT_TUNING adapter, which changes the prompt")


def test_adapters_in_inner_folders_are_named(folder, tmp_path, no_weights):
    saved(tmp_path / "run" / "second")
    refused(folder, tmp_path / "run", r"no usable adapter.*it holds .*run/second")


def test_a_model_behind_an_api_takes_no_adapter(folder, tmp_path):
    saved(tmp_path)
    api = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    spec = ModelSpec(str(folder / "base"), adapter=str(tmp_path), api=api)
    with pytest.raises(UserError, match="needs the model on this machine"):
        check_triple({"base": spec})


def test_a_tensor_that_has_not_arrived_is_an_error(folder, tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(adapters_module, "check_adapter", lambda *_: None)
    edited(tmp_path, lambda name, tensor: (name, tensor))
    real = adapters_module.tensors_of
    changed = ((n, t + 1) for n, t in real("model", spec_of(folder, tmp_path)))
    monkeypatch.setattr(adapters_module, "tensors_of", lambda *_: changed)
    with pytest.raises(UserError, match=r"its tensor .*lora_A.* has not arrived in .*antiexpert"):
        adapters_module.put_adapter(tiny_model("llama", 3), spec_of(folder, tmp_path))


def test_what_arrives_is_looked_at_without_the_check_before(folder, tmp_path):
    """Fails on 538a493: `load_member` gave the model without its adapter."""
    saved(tmp_path)
    edited(tmp_path, lambda name, tensor: (name.removeprefix("base_model.model."), tensor))
    with pytest.raises(UserError, match=r"its tensor .*lora_A.* has not arrived in .*antiexpert"):
        load_member(spec_of(folder, tmp_path))


# -- adapters that arrive --------------------

KINDS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS, lora_alpha=16, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(
        r=4, target_modules=TARGETS, lora_alpha=8, use_rslora=True, task_type="CAUSAL_LM"
    ),
    "ranks": LoraConfig(
        r=4,
        target_modules=TARGETS,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6},
        alpha_pattern={"v_proj": 32},
        task_type="CAUSAL_LM",
    ),
    "all_linear": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "regex": LoraConfig(r=2, target_modules=r".*\.1\..*_proj", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "head": LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "untyped": LoraConfig(r=4, target_modules=TARGETS),
}
SHARED = {"lora", "rslora", "ranks", "all_linear", "regex", "embedding", "untyped"}


FAST = ("lora", "dora", "head")  # one that shares the weights, one that does not, one beside layers


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS],
)
def test_an_adapter_that_fits_equals_its_merged_weights(folder, tmp_path, kind):
    adapted = saved(tmp_path, KINDS[kind])
    merged = adapted.merge_and_unload().eval()
    expert, antiexpert = spec_of(folder, tmp_path), ModelSpec(str(folder / "antiexpert"))
    assert shares_weights(expert, antiexpert) == (kind in SHARED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's about tensors that it did not find
        got = proxytune.load(str(folder / "base"), expert, antiexpert)
    want = proxytune.load(plain_model(1), merged, plain_model(3))
    torch.testing.assert_close(got.logits([1, 40, 41]), want.logits([1, 40, 41]), rtol=0, atol=2e-3)
    alone = proxytune.load(plain_model(1), plain_model(3), plain_model(3))
    assert (got.logits([1, 40, 41]) - alone.logits([1, 40, 41])).abs().max() > 0.1
    settings = {"max_new_tokens": 8}
    texts = [g.token_ids for g in got.generate(PROMPTS, **settings)]
    assert texts == [g.token_ids for g in want.generate(PROMPTS, **settings)]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("how", ["embeddings", "bias"])
def test_an_adapter_that_changes_the_models_own_tensors_gets_a_copy(folder, tmp_path, how):
    """Fails on 538a493: the antiexpert's embedding was the adapter's."""
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        bias="lora_only" if how == "bias" else "none",
        task_type="CAUSAL_LM",
    )
    more = {"attention_bias": True, "mlp_bias": True} if how == "bias" else {}
    model = save_tiny(tmp_path / "model", seed=3, **more)
    adapted = trained(config, model=tiny_model("llama", 3, **more))
    if how == "embeddings":
        with torch.no_grad():
            adapted.get_input_embeddings().weight.mul_(-1)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=how == "embeddings")
    merged = adapted.merge_and_unload().eval()
    spec = ModelSpec(str(model), adapter=str(tmp_path / "lora"))
    assert not shares_weights(spec, ModelSpec(str(model)))
    got = proxytune.load(str(folder / "base"), spec, str(model))
    want = proxytune.load(tiny_model("llama", 1), merged, tiny_model("llama", 3, **more))
    torch.testing.assert_close(got.logits([1, 40, 41]), want.logits([1, 40, 41]), rtol=0, atol=2e-3)


def test_pytorchs_own_file_format(folder, tmp_path):
    merged = saved(tmp_path).merge_and_unload().eval()
    as_bin(tmp_path)
    got = proxytune.load(spec_of(folder, tmp_path))
    torch.testing.assert_close(
        got.logits([1, 40]), proxytune.load(merged).logits([1, 40]), rtol=0, atol=1e-3
    )


# -- what belongs to an adapter --------------------


def test_another_model_than_it_was_trained_on_is_said(folder, tmp_path, caplog):
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    for name, said in (("meta-llama/Llama-2-7b-hf", True), ("someone/antiexpert", False)):
        caplog.clear()
        file.write_text(json.dumps(told | {"base_model_name_or_path": name}))
        check_triple({"expert": spec_of(folder, tmp_path)})
        assert (f"was trained on {name}" in caplog.text) == said


def test_the_adapters_tokenizer_and_template_are_used(folder, tmp_path, caplog):
    """Fails on 538a493: the model's own template was used."""
    saved(tmp_path)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path)
    spec = spec_of(folder, tmp_path)
    check_triple({"expert": spec})
    assert f"expert: the chat template is that of the adapter {tmp_path}" in caplog.text
    assert load_tokenizer(spec).chat_template == template
    facts = {"revision": None, "adapter_revision": None, "trust_remote_code": False}
    chat = {"kind": "chat", "chat_template": None}
    found = [
        model_facts({"id": spec.id, "adapter": adapter, "format": chat} | facts)
        for adapter in (None, spec.adapter)
    ]
    assert found[0]["chat_template_sha256"] != found[1]["chat_template_sha256"]


def test_a_template_alone_goes_with_the_models_tokenizer(folder, tmp_path, caplog):
    saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    spec = spec_of(folder, tmp_path)
    check_triple({"expert": spec})
    assert "the chat template is that of the adapter" in caplog.text
    assert load_tokenizer(spec).chat_template == "{{ messages[0]['content'] }}!"


def test_an_adapter_of_another_vocabulary(folder, tmp_path, no_weights):
    saved(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    by_id = {i: word for word, i in vocab.items()}
    vocab[by_id[70]], vocab[by_id[71]] = 71, 70
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    refused(folder, tmp_path, r"token 70 is .* to the expert's model and .* expert's adapter")


def test_an_adapter_with_more_tokens_than_the_model(folder, tmp_path, no_weights):
    saved(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path)
    refused(folder, tmp_path, r"has token 300, and the embedding of .* ends at 299.*merge")
