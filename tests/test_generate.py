"""Which models are in memory while the systems of a run generate."""

import weakref
from typing import Any

import pytest
from tiny import tiny_model

import proxytune.api  # noqa: F401  imported later, it would keep the `load_member` of `loads`
from proxytune.experiment.cells import GenerationSettings, TaskCell
from proxytune.experiment.generate import ModelPool, generate
from proxytune.loading import load
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.records import Decoding
from proxytune.roles import MEMBERS

SPECS = {role: ModelSpec(role) for role in ("base", "expert", "antiexpert", "tuned")}


class AskingCell(TaskCell):
    def missing(self) -> list[Any]:
        return [1]

    def generate(self, generator, settings, progress):
        (generation,) = generator.generate([[3, 4, 5]], max_new_tokens=2)
        return {"tokens": len(generation.token_ids), "seconds": 1.0}


class FinishedCell(TaskCell):
    def missing(self) -> list[Any]:
        return []


def cell(kind: type[TaskCell], system: str, folder) -> TaskCell:
    return kind(
        task=None,
        task_name="words",
        system=system,
        folder=folder,
        identity={},
        examples=[],
        decoding=Decoding(),
    )


@pytest.fixture
def loads(monkeypatch) -> list[tuple[str, set[str]]]:
    """Each load: the model's name, and the models that are in memory at that time."""
    alive: dict[str, Any] = {}
    found = []

    def load_member(spec, share=None):
        found.append((spec.id, {name for name, model in alive.items() if model() is not None}))
        model = tiny_model(seed=len(found))
        alive[spec.id] = weakref.ref(model)
        return LoadedModel(model, None, spec)

    monkeypatch.setattr(load, "load_member", load_member)
    return found


def run(cells) -> dict[str, dict[str, float]]:
    systems = [each.system for each in cells]
    members = {system: MEMBERS[system] for system in systems}
    with ModelPool(SPECS, members, alpha=1.0, cuda_graphs=False) as pool:
        return generate(cells, pool, GenerationSettings())


@pytest.mark.slow
def test_a_model_is_loaded_once_and_freed_before_the_next_system_loads(loads, tmp_path):
    systems = ("expert", "base", "proxy", "tuned")
    throughput = run([cell(AskingCell, system, tmp_path) for system in systems])
    assert loads == [
        ("expert", set()),
        ("base", {"expert"}),
        ("antiexpert", {"expert", "base"}),
        ("tuned", set()),
    ]
    assert list(throughput) == [f"{system}/words" for system in systems]


@pytest.mark.slow
def test_a_system_without_anything_to_do_is_not_loaded(loads, tmp_path):
    run([cell(FinishedCell, "base", tmp_path), cell(AskingCell, "tuned", tmp_path)])
    assert [name for name, _ in loads] == ["tuned"]
