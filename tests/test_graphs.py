"""Recorded decode steps, with traces in the place of CUDA graphs.

`make_fx` writes down the tensor operations of one pass, on the tensors that they ran on. Like a
CUDA graph, its replay runs no Python of ours: a number that changes from step to step and is not
in a buffer is wrong in it.
"""

from typing import Any

import pytest
import torch
from tiny import ARCHS, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

import proxytune
from proxytune.members import graphs

NOT_ON_A_GPU = ("lift_fresh", "local_scalar_dense")  # a tensor from the host, a number to it
PROMPTS = [list(range(3, 3 + length)) for length in (4, 9, 20, 5, 30)]


class Tracer:
    """Counts recordings and replays; refuses operations that a CUDA graph cannot record."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, run):
        trace = make_fx(run)()
        names = {str(node.target) for node in trace.graph.nodes}
        assert not [name for name in names if any(bad in name for bad in NOT_ON_A_GPU)]
        self.recordings += 1

        def replay():
            self.replays += 1
            return trace()

        return replay


LONG = (
    "gemma3",
    "gpt2",
    "mistral_sliding",
    "qwen2",
    "qwen3",
)  # these take six to twenty seconds each
SLOW = ((), (pytest.mark.slow,))


def recorded(members: dict[str, Any], record):
    generator = proxytune.load(**members)
    for member in generator.system.members.values():
        member.joins = False  # as on a GPU
        member.record(record)
    return generator


def triple(arch) -> dict[str, Any]:
    small: dict[str, Any] = {"layers": 1} if arch != "gemma3" else {}
    roles = ("base", "expert", "antiexpert")
    return {role: tiny_model(arch, seed, **small) for seed, role in enumerate(roles)}


def texts(generator, **settings):
    done = generator.generate(PROMPTS, max_new_tokens=24, batch_size=3, **settings)
    return [each.token_ids for each in done]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param(a, marks=SLOW[a in LONG]) for a in ARCHS])
def test_replays_write_the_same_text(arch):
    members, record = triple(arch), Tracer()
    want = texts(proxytune.load(**members))
    generator = recorded(members, record)
    assert texts(generator, speculative=False) == want
    assert record.recordings >= 3 and record.replays > 3 * record.recordings
    assert texts(generator, speculative=3) == want
    assert all(member.recorded.usable for member in generator.system.members.values())


@pytest.mark.slow
def test_a_cache_that_moves_is_recorded_anew():
    model, record = tiny_model("llama", 0), Tracer()
    want = proxytune.load(model).generate([[5, 6]], max_new_tokens=150)[0].token_ids
    generator = proxytune.load(model)
    generator.system.member.joins = False
    generator.system.member.record(record)
    assert generator.generate([[5, 6]], max_new_tokens=150)[0].token_ids == want
    assert record.recordings > 1


@pytest.mark.thinned(1)
@pytest.mark.parametrize("way", ["wrong", "refused"])
def test_a_recording_that_fails_is_not_used(way, caplog):
    def record(run):
        if way == "refused":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: run() + torch.arange(300)

    members = triple("llama")
    generator = recorded(members, record)
    assert texts(generator, speculative=False) == texts(proxytune.load(**members))
    assert not generator.system.members["base"].recorded.usable
    wrong = "the logits come out otherwise"
    assert {"wrong": wrong, "refused": "operation not permitted"}[way] in caplog.text


def test_memory_that_runs_out_while_recording_is_not_a_reason_to_stop_recording():
    model, record = tiny_model("llama", 0), Tracer()
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def sometimes(run):
        if failures:
            raise failures.pop()
        return record(run)

    generator = proxytune.load(model)
    generator.system.member.joins = False
    generator.system.member.record(sometimes)
    want = texts(proxytune.load(model))
    assert texts(generator) == want
    assert not failures and record.replays and generator.system.member.recorded.usable


def test_only_so_many_recordings_are_kept():
    model = tiny_model("llama", 0)
    generator = proxytune.load(model)
    generator.system.member.joins = False
    generator.system.member.record(Tracer())
    for width in range(1, graphs.KEPT + 4):
        generator.system.member.prefill([[3, 4]])
        with torch.inference_mode():
            generator.system.member.extend(torch.full((len(generator.system.lengths), width), 7))
    assert len(generator.system.member.recorded._steps) <= graphs.KEPT


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="needs a GPU"):
        proxytune.load(tiny_model("llama", 0), cuda_graphs=True)


@pytest.mark.gpu
def test_cuda_graphs_write_the_same_text():
    members = triple("llama")
    for model in members.values():
        model.to("cuda")
    want = texts(proxytune.load(**members))
    generator = proxytune.load(**members, cuda_graphs=True)
    assert texts(generator, speculative=False) == want
    assert texts(generator, speculative=3) == want
    assert all(member.recorded.usable for member in generator.system.members.values())


def test_a_recording_after_all_others_are_dropped_gets_a_new_pool(monkeypatch):
    """torch frees a pool with its last graph, and a capture into it fails (seen on an H200)."""
    from contextlib import nullcontext

    class Graph:
        def replay(self):
            pass

    handles = iter(range(9))
    used = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, pool, *_, **__: used.append(pool) or nullcontext()
    )
    recorder = graphs.CudaRecorder(torch.device("cuda:0"))
    first = recorder(lambda: torch.zeros(1))
    second = recorder(lambda: torch.ones(1))
    assert used[0] == used[1]
    assert second() == 1
    del first, second
    recorder(lambda: torch.zeros(1))
    assert used[2] not in used[:2]
