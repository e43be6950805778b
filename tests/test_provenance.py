"""run.json's ingredients change when, and only when, what they stand for does."""

from typing import Any

from proxytune import provenance
from proxytune.files import ROOT
from proxytune.loading.prompting import read_template
from proxytune.records import Example, Prompt


def example(question: str = "q", target: str = "t") -> Example:
    return Example("1", Prompt(raw=question, user=question), target)


def test_dataset_hash_sees_prompt_target_and_order():
    first, second = example(), Example("2", Prompt("b", "b"))
    base = provenance.dataset_sha256([first, second])
    assert provenance.dataset_sha256([first, second]) == base
    assert provenance.dataset_sha256([second, first]) != base
    assert provenance.dataset_sha256([example("other"), second]) != base
    assert provenance.dataset_sha256([example(target="other"), second]) != base


def test_weights_fingerprint_of_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 200_000)
    before = provenance.weights_fingerprint(str(tmp_path))
    assert before == provenance.weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 199_999 + b"1")
    assert provenance.weights_fingerprint(str(tmp_path)) != before
    assert provenance.weights_fingerprint("some-org/some-model") is None


def test_differences_names_the_leaves():
    old = {"alpha": 1.0, "decoding": {"n": 1, "seed": 0}, "gone": 1}
    new = {"alpha": 0.5, "decoding": {"n": 1, "seed": 3}}
    assert provenance.differences(old, new) == [
        "alpha: 1.0 -> 0.5",
        "decoding.seed: 0 -> 3",
        "gone: 1 -> None",
    ]
    assert provenance.differences(old, old) == []


def test_environment_names_versions_and_hardware():
    found = provenance.environment()
    assert found["versions"]["torch"] and found["versions"]["transformers"]
    assert found["hardware"]["cores"] >= 1
    assert set(found["git"]) == {"commit", "dirty"}


def member(**changes: Any) -> dict[str, Any]:
    plain = {"id": "some-org/some-model", "revision": None, "adapter": None}
    plain |= {"adapter_revision": None, "trust_remote_code": False}
    return plain | {"format": {"kind": "raw", "chat_template": None}} | changes


def test_a_hub_model_is_known_by_the_commit_that_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert provenance.model_facts(member()) == {}
    repo = tmp_path / "models--some-org--some-model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert provenance.model_facts(member()) == {"commit": "abc"}
    assert provenance.model_facts(member(revision="v2")) == {}


def test_adapters_and_chat_templates_are_known_by_their_contents(tmp_path):
    adapter, template = tmp_path / "adapter", tmp_path / "mine.jinja"
    adapter.mkdir()
    chat = {"kind": "chat", "chat_template": str(template)}
    found = []
    for content in ("one", "two"):
        (adapter / "adapter_model.safetensors").write_text(content)
        template.write_text(content)
        read_template.cache_clear()
        found.append(provenance.model_facts(member(adapter=str(adapter), format=chat)))
    assert found[0].keys() == {"adapter_weights", "chat_template_sha256"}
    assert all(found[0][name] != found[1][name] for name in found[0])


def test_the_pocket_experts_own_template_is_known():
    chat = {"kind": "chat", "chat_template": None}
    facts = provenance.model_facts(member(id=str(ROOT / "pocket/models/expert"), format=chat))
    assert len(facts["chat_template_sha256"]) == 64
