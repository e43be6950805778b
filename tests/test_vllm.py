"""engine=vllm on tiny random triples: equal to proxytune's own engine in every way to run it.

Marked `vllm`: `make test-vllm` runs it in vLLM's environment. vLLM's model runner V2 runs here by
Triton's interpreter (tests/vllm_site).
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make vllm-env"),
]

ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "vllm_site"), str(ROOT)]),
}
ROWS = {"max_num_seqs": 16}
CHUNKED = ROWS | {"max_num_batched_tokens": 48}
TIGHT = CHUNKED | {"num_gpu_blocks_override": 20, "block_size": 32}
EVERY = ("greedy", "sampled", "penalised", "lists", "filters", "context_ends", "texts")
EVERY += ("cancelled", "paused", "likelihoods", "ratings", "listed")
SHORT = ("greedy", "sampled")
OWN = [["own", case] for case in ("greedy", "sampled", "penalised", "alphas", "likelihoods")]


def one(*cases: str) -> list[list[str]]:
    return [["one", case] for case in cases]


# way to run an engine -> environment, settings, cases
WAYS: dict[str, tuple[dict[str, str], dict[str, Any], list[list[str]]]] = {
    "V1": ({}, {"options": ROWS}, one(*EVERY)),
    "V1, chunked and preempted": ({}, {"options": TIGHT, "max_model_len": 200}, one(*SHORT)),
    "V1, compiled": ({}, {"options": ROWS, "enforce_eager": False}, one(*SHORT)),
    "V1, unequal members": ({}, {"options": ROWS, "expert": "odd"}, one(*SHORT)),
    "V1, a LoRA of the antiexpert": ({}, {"options": ROWS, "expert": "lora"}, one(*SHORT)),
    "V1, the sampler of vLLM": (
        {},
        {"options": ROWS, "sampler": "vllm"},
        one("greedy", "repeats", "likelihoods"),
    ),
    "V1, two processes": ({}, {"options": ROWS, "tensor_parallel_size": 2}, one(*SHORT)),
    "V1, n-gram drafts": ({}, {"options": ROWS, "speculative": "ngram"}, one("greedy", "texts")),
    "V1, the expert drafts": (
        {},
        {
            "options": ROWS,
            "base": "even",  # vLLM drafts where the logits of both have one size
            "speculative": "draft_model",
            "speculative_tokens": 2,
        },
        one("greedy"),
    ),
    "V2": (V2, {"options": ROWS}, [*one("greedy", "alphas", "likelihoods", "listed"), *OWN]),
    "V2, chunked and preempted": (
        V2,
        {"options": TIGHT, "max_model_len": 200},
        [["own", "greedy"], ["own", "alphas"]],
    ),
    "V2, two processes": (
        V2,
        {"options": ROWS, "tensor_parallel_size": 2},
        [["own", "greedy"], ["own", "sampled"]],
    ),
}
ASKED = [(way, f"{kind}-{case}") for way in WAYS for kind, case in WAYS[way][2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@cache
def results(way: str, folder: Path) -> dict[str, str]:
    environment, settings, cases = WAYS[way]
    arguments = [str(folder), json.dumps(settings), json.dumps(cases)]
    return said("tests.vllm_cases", arguments, environment)


def said(module: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The results that a module prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ON_CPU | environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, f"{module} {arguments}: {done.stderr[-3000:]}"
    return json.loads(lines[-1].removeprefix("RESULTS "))


@pytest.mark.parametrize(("way", "case"), ASKED, ids=[f"{w}-{c}" for w, c in ASKED])
def test_it_writes_what_our_own_engine_writes(way, case, folder):
    assert results(way, folder)[case] == ""


def test_a_base_in_8_bits_beside_helpers_in_float32(tmp_path):
    found = said("tests.vllm_quantised", [str(tmp_path)], {})
    assert found["rows"] > 20
    assert found["quantised"] > 0.01, "it is another model than the base in float32"
    assert found["triple"] < 1e-3, "the triple's logits are the sum of its members' in vLLM"
