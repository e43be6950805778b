"""The benchmark script: its measurements are right, on models too small to time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.files import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import bench
import bench_cases
import bench_models
import bench_workloads

from proxytune.engine import speculation
from proxytune.members import cached, narrow

TINY, TINIER = bench_models.SHAPE_TINY, bench_models.SHAPE_TINIER


def test_the_command_line_knows_every_benchmark_and_size() -> None:
    assert tuple(bench_cases.CASES) == bench.ONLY and tuple(bench_cases.SIZES) == bench.SIZES
    with pytest.raises(ValueError, match="--clock cpu needs"):
        bench.main(["--size", "tiny", "--clock", "cpu"])


def run(tmp_path: Path, *names: str) -> dict[str, Any]:
    out = tmp_path / "bench.json"
    only = [argument for name in names for argument in ("--only", name)]
    bench.main(["--size", "tiny", "--rounds", "1", "--json", str(out), *only])
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_ratio_of_the_issue_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, "decode", "mixed", "speculative", "table12")
    assert report["lockstep_over_sum"].keys() == {"1", "8"}
    assert report["mixed_speedup"].keys() == {"uniform", "heavy_tailed"}
    assert report["mixed_share_of_bound"].keys() == {"uniform", "heavy_tailed"}
    acceptances = {"0.3", "0.5", "0.8", "0.95"}
    assert report["speculative_speedup"].keys() == acceptances
    assert report["speculative_over_tuned"].keys() == acceptances
    assert report["table12_proxy_over_tuned"].keys() == {"8,512", "512,8", "8,8"}
    ratios = [
        value
        for key in ("lockstep_over_sum", "mixed_speedup", "speculative_speedup")
        for value in report[key].values()
    ]
    assert all(0.01 < ratio < 100 for ratio in ratios)
    assert report["versions"]["torch"] and report["hardware"]["cores"]
    table = (tmp_path / "bench.md").read_text()
    share = report["mixed_share_of_bound"]["uniform"]
    assert f"| mixed_share_of_bound | uniform | {share:.3f} | at least 0.85 |" in table
    assert "speculative_over_tuned" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    report = run(tmp_path, "memory")
    sizes = report["memory_bytes"]
    per_token = 2 * 4 * (TINY.layers * TINY.hidden + 2 * TINIER.layers * TINIER.hidden)
    assert sizes["caches"] == 4 * 64 * per_token
    assert sizes["weights"] > 0 and report["peak_memory_over_sum"] > 0


@pytest.mark.slow
def test_the_parts_for_speed_are_switched_off_and_on_again(tmp_path: Path) -> None:
    report = run(tmp_path, "parts")
    parts = ("packed_passes", "narrow_products", "adapted_drafts", "probing")
    for part in parts:
        assert all(0.01 < ratio < 100 for ratio in report[f"gain_of_{part}"].values())
    assert report["gain_of_packed_passes"].keys() == {"uniform", "heavy_tailed"}
    assert "| gain_of_probing | acceptance 0.8 |" in (tmp_path / "bench.md").read_text()
    assert speculation.FIRST_GAP < 10**9 and cached.narrow_products is narrow.narrow_products


@pytest.mark.slow
def test_an_agreeing_triple_agrees_as_often_as_asked() -> None:
    for acceptance in (0.3, 0.9):
        triple = bench_models.agreeing_triple(TINY, TINIER, acceptance)
        prompts = torch.randint(TINY.vocab, (8, 16)).tolist()
        texts = bench_workloads.lockstep(triple.members, prompts, 64).tolist()
        whole = [p + t for p, t in zip(prompts, texts, strict=True)]
        assert bench_cases._agreement(triple.expert, whole, 16) == pytest.approx(
            acceptance, abs=0.15
        )


def test_a_widened_model_computes_the_same() -> None:
    small = bench_models.random_llama(TINIER, 0)
    wide = bench_models.widened(small, TINY)
    ids = torch.randint(TINIER.vocab, (2, 20))
    assert wide.num_parameters() > 2 * small.num_parameters()
    assert torch.allclose(small(ids).logits, wide(ids).logits, atol=1e-5)


def test_the_plain_loop_is_what_the_engine_computes() -> None:
    triple = bench_models.agreeing_triple(TINY, TINIER, 0.5)
    work = bench_workloads.Workload([[5, 6, 7], [8] * 9, [4]], [12, 12, 12])
    plain = bench_workloads.lockstep(triple.members, work.prompts, 12).tolist()
    assert bench_cases._generate(bench_cases._load(triple), work, 2) == plain


def test_workloads_are_as_uneven_as_described() -> None:
    uniform = bench_workloads.workload("uniform", 2000, 100)
    heavy = bench_workloads.workload("heavy_tailed", 2000, 100)
    prompts = [len(p) for p in uniform.prompts]
    assert (min(prompts), max(prompts)) == (8, 512)
    assert (min(uniform.lengths), max(uniform.lengths)) == (1, 256)
    assert sorted(heavy.lengths)[1000] == pytest.approx(60, abs=6) and max(heavy.lengths) == 1024
    with pytest.raises(ValueError, match="not bimodal"):
        bench_workloads.workload("bimodal", 2, 100)


def test_the_bound_has_as_many_row_steps_in_full_batches() -> None:
    work = bench_workloads.workload("heavy_tailed", 30, 100)
    even = work.equalized(8)
    assert len(even.prompts) == 32 and len({*map(len, even.prompts)}) == 1
    assert sum(even.lengths) == pytest.approx(sum(work.lengths), abs=32)
    assert sum(map(len, even.prompts)) == pytest.approx(sum(map(len, work.prompts)), abs=32)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--only", "everything"])
    assert stopped.value.code != 0 and "decode" in capsys.readouterr().err
