"""Loading: refusals before any weights are read, adapters, members without a cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny import ARCHS, save_tiny, tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, BloomConfig

import proxytune
from proxytune.loading import load as load_module
from proxytune.loading.build import shares_weights
from proxytune.loading.load import check_triple, load_member
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary
from proxytune.members.cached import CachedModel
from proxytune.members.choose import make_member
from proxytune.members.facts import TRIED
from proxytune.members.recomputed import RecomputedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models: base, expert, antiexpert, and some that do not fit."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 1), ("expert", 2), ("antiexpert", 3)):
        save_tiny(root / name, seed=seed)
    other = tiny_tokenizer(chat_template=None)
    words = json.loads(other.backend_tokenizer.to_str())
    vocab = words["model"]["vocab"]
    by_id = {i: word for word, i in vocab.items()}
    vocab[by_id[70]], vocab[by_id[71]] = 71, 70
    other_folder = save_tiny(root / "swapped", seed=4)
    (other_folder / "tokenizer.json").write_text(json.dumps(words))
    return root


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.thinned(1)
def test_a_triple_that_fits(folder, no_weights):
    specs = {role: ModelSpec(str(folder / role)) for role in ("base", "expert", "antiexpert")}
    assert check_triple(specs) == 300


def test_the_first_differing_token_is_named(folder, no_weights):
    specs = {"base": ModelSpec(str(folder / "base")), "expert": ModelSpec(str(folder / "swapped"))}
    with pytest.raises(
        ValueError, match=r"token 70 is .* to the base and .* to the expert"
    ) as error:
        check_triple(specs)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="token 70"):
        proxytune.load(
            str(folder / "base"),
            expert=str(folder / "swapped"),
            antiexpert=str(folder / "antiexpert"),
        )


def test_surplus_tokens_behind_the_shared_ones_are_cut():
    base, expert = tiny_tokenizer(), tiny_tokenizer()
    expert.add_tokens([AddedToken("<infill>", special=True), AddedToken("more")])
    sizes = {"base": 304, "expert": 302}
    assert len(expert) == 302
    assert common_vocabulary({"base": base, "expert": expert}, sizes) == 300
    # Also the other way round, for tokens added after the vocabulary ...
    assert common_vocabulary({"base": expert, "expert": base}, sizes) == 300
    # ... and where a model has fewer rows than its tokenizer has tokens.
    assert common_vocabulary({"base": expert}, {"base": 301}) == 301


def test_text_of_the_base_that_a_helper_lacks_is_refused():
    with pytest.raises(
        ValueError, match=r"the base has the token .* but the expert ends at id 279"
    ):
        common_vocabulary({"base": tiny_tokenizer(), "expert": tiny_tokenizer(280)}, {})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./nowhere/at/all", "there is no folder ./nowhere/at/all"),
        ("/nowhere", "there is no folder /nowhere"),
        ("no-such-org-x/no-such-model", "neither a local folder nor a model"),
    ],
)
def test_a_missing_model_is_one_line(folder, no_weights, monkeypatch, name, hint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=hint) as error:
        proxytune.load(str(folder / "base"), expert=name, antiexpert=str(folder / "antiexpert"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("expert: ")


def test_a_folder_without_a_model_is_one_line(tmp_path, no_weights):
    with pytest.raises(ValueError, match=r"has no usable config\.json") as error:
        proxytune.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_adapter_is_found_before_weights_are_read(folder, no_weights, tmp_path):
    spec = ModelSpec(str(folder / "antiexpert"), adapter=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"expert: there is no folder .*none"):
        proxytune.load(str(folder / "base"), expert=spec, antiexpert=str(folder / "antiexpert"))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="dtype='fp8'"):
        ModelSpec("x", dtype="fp8")
    with pytest.raises(ValueError, match="flash_attention_2"):
        ModelSpec("x", attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="both an expert and an antiexpert"):
        proxytune.load("x", expert="y")


def test_dtype_and_paths(folder):
    loaded = load_member(ModelSpec(str(folder / "base"), dtype="bfloat16"))
    assert loaded.model is not None
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.eos_ids == {2}
    generator = proxytune.load(
        str(folder / "base"), str(folder / "expert"), str(folder / "antiexpert")
    )
    loaded_already = proxytune.load(*(tiny_model("llama", seed) for seed in (1, 2, 3)))
    prompt = generator.tokenizer("The answer is")["input_ids"]
    got = generator.generate(["The answer is"], max_new_tokens=8)
    assert got[0].token_ids == loaded_already.generate([prompt], max_new_tokens=8)[0].token_ids


@pytest.mark.parametrize("arch", ARCHS)
def test_known_architectures_are_cached(arch, caplog):
    assert isinstance(make_member(tiny_model(arch), 300), CachedModel)
    assert not caplog.text


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_prefill_asks_for_one_row_of_logits_per_prompt(arch):
    member = CachedModel(tiny_model(arch), 300)
    prompts = [list(range(3, 3 + length)) for length in (16, 13, 12, 16, 14)]
    sizes = []
    head = member.model.get_output_embeddings()
    counter = head.register_forward_hook(lambda *call: sizes.append(call[2].shape[:2].numel()))
    with torch.inference_mode():
        got = member.prefill(prompts).logits
        assert sizes == [len(prompts)]
        counter.remove()
        assert not head._forward_pre_hooks  # a pass leaves none, whether it fails or not
        want = RecomputedModel(member.model, 300).prefill(prompts).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tried", "hint"), [("99.1.0", True), (transformers.__version__, False)])
def test_another_transformers_that_may_help_is_named(tried, hint, caplog, monkeypatch):
    monkeypatch.setattr("proxytune.members.facts.TRIED", tried)
    monkeypatch.setattr("proxytune.members.cache.RowCache.update", lambda *args: None)
    assert isinstance(make_member(tiny_model("llama"), 300), RecomputedModel)
    assert "exact but slow" in caplog.text
    assert (f"with {tried} it may be otherwise" in caplog.text) == hint


def test_the_tried_transformers_is_the_pinned_one():
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    assert f"transformers=={TRIED}\n" in constraints


def test_what_the_cache_cannot_carry_is_recomputed_with_a_warning(caplog):
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bloom = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(make_member(bloom, 300), RecomputedModel)
    assert "exact but slow" in caplog.text
    prompts = [[1, 40, 41], [1, 9, 8, 7]]
    generator = proxytune.load(bloom)
    got = generator.generate(prompts, max_new_tokens=6)
    for prompt, generation in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        want = bloom.generate(
            ids, do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(ids)
        )
        assert generation.token_ids == [t for t in want[0, len(prompt) :].tolist() if t != 2]
    mixed = proxytune.load(tiny_model("llama", 1), bloom, tiny_model("llama", 3))
    want = mixed.generate(prompts, max_new_tokens=8, speculative=False)
    assert mixed.generate(prompts, max_new_tokens=8, speculative=2) == want


# -- an expert that is an adapter of the antiexpert --------------------


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA on the saved antiexpert, and the same with its weights merged, as a plain model."""
    from peft import LoraConfig, get_peft_model

    plain = tiny_model("llama", 3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=16)
    adapted = get_peft_model(plain, lora)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder / "lora")
    return folder / "lora", adapted.merge_and_unload().eval()


@pytest.mark.thinned(1)
def test_an_adapter_of_the_antiexpert_shares_its_weights(folder, adapter):
    path, merged = adapter
    base, antiexpert = str(folder / "base"), str(folder / "antiexpert")
    expert = ModelSpec(antiexpert, adapter=str(path))
    assert shares_weights(expert, ModelSpec(antiexpert))
    assert not shares_weights(expert, ModelSpec(base))
    generator = proxytune.load(base, expert, antiexpert)
    weights = {
        role: member.model.get_input_embeddings().weight.data_ptr()
        for role, member in generator.members.items()
    }
    assert weights["expert"] == weights["antiexpert"] != weights["base"]
    apart = proxytune.load(tiny_model("llama", 1), merged, tiny_model("llama", 3))
    prompts = [
        {"base": [1, 40, 41], "expert": [1, 7, 7, 7, 9, 40, 41], "antiexpert": [1, 40, 41]},
        {"base": [1, 9], "expert": [1, 9], "antiexpert": [1, 9]},
        {"base": [1, 70], "expert": [1, 70], "antiexpert": [1, 70]},
    ]
    want = [g.token_ids for g in apart.generate(prompts, max_new_tokens=12)]
    plain = proxytune.load(tiny_model("llama", 3)).generate([[1, 9]], max_new_tokens=12)
    assert want[1] != plain[0].token_ids
    for setting in ({}, {"speculative": 3}, {"speculative": False}, {"batch_size": 2}):
        got = generator.generate(prompts, max_new_tokens=12, **setting)
        assert [g.token_ids for g in got] == want
    calls = []
    forward = generator.members["expert"].model.forward
    both = generator.system.members["expert"].model
    plain_call = both._call
    both._call = lambda rows, **inputs: (calls.append(len(rows)), plain_call(rows, **inputs))[1]
    generator.generate(prompts[1:], max_new_tokens=4, speculative=False)
    assert calls == [2, 2, 4, 4, 4]  # two prefills, then both in one pass of twice the rows
    assert forward is not None


def test_the_antiexpert_alone_is_without_the_adapter(folder, adapter):
    spec = ModelSpec(str(folder / "antiexpert"))
    antiexpert = load_member(spec)
    expert = load_member(ModelSpec(spec.id, adapter=str(adapter[0])), share=antiexpert)
    prompts = [[1, 40, 41], [1, 9]]
    want = proxytune.load(tiny_model("llama", 3)).generate(prompts, max_new_tokens=10)
    got = proxytune.load(antiexpert).generate(prompts, max_new_tokens=10)
    assert [g.token_ids for g in got] == [g.token_ids for g in want]
    tuned = proxytune.load(expert).generate(prompts, max_new_tokens=10)
    merged = proxytune.load(adapter[1]).generate(prompts, max_new_tokens=10)
    assert [g.token_ids for g in tuned] == [g.token_ids for g in merged]
    assert [g.token_ids for g in tuned] != [g.token_ids for g in want]


def test_an_adapter_elsewhere_has_weights_of_its_own(folder, adapter, tmp_path):
    moved = tmp_path / "copy"
    shutil.copytree(folder / "antiexpert", moved)
    expert = ModelSpec(str(moved), adapter=str(adapter[0]))
    generator = proxytune.load(str(folder / "base"), expert, str(folder / "antiexpert"))
    apart = proxytune.load(tiny_model("llama", 1), adapter[1], tiny_model("llama", 3))
    want = apart.generate([[1, 9]], max_new_tokens=10)[0].token_ids
    assert generator.generate([[1, 9]], max_new_tokens=10)[0].token_ids == want
