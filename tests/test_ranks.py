"""Tensor parallelism: what two ranks generate is what one process generates.

538a493 has no `machine.tensor_parallel`; under torchrun its ranks die on the lock.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.loading.ranks import check_parts

WORDS = ["task=[pocket_triviaqa]", "limit=24", "report=false"]


def start(folder: Path, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "run.py"), *WORDS,
         f"output_dir={folder}", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip


def texts(folder: Path) -> dict[str, dict[tuple[str, int], str]]:
    found = {}
    for path in sorted(folder.glob("*/*/completions.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = {(r["example_id"], r["sample"]): r["raw_text"] for r in rows}
        assert len(found[path.parent.name]) == len(rows)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "words",
    [
        ["decoding=default"],  # draws and batch sizes are "auto"
        ["decoding=default", "decoding.speculative=3", "systems=[proxy]"],
        ["decoding=default", "decoding.temperature=0.9", "decoding.n=3", "systems=[proxy]"],
        ["formula=dexperts", "decoding.batch_size=3", "systems=[base,proxy]"],
    ],
)
def test_two_ranks_generate_what_one_process_does(words, tmp_path):
    two = start(tmp_path / "two", "machine.tensor_parallel=2", *words, ranks=2)
    assert two.returncode == 0, two.stderr
    one = start(tmp_path / "one", *words)
    assert one.returncode == 0, one.stderr
    assert texts(tmp_path / "two") == texts(tmp_path / "one")
    assert two.stdout == one.stdout, "a rank beside the first one spoke"
    # the folder belongs to neither way
    more = start(tmp_path / "two", *words, "limit=25")
    assert more.returncode == 0, more.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_alone_ends_in_our_line(tmp_path):
    done = start(tmp_path / "run", ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("error: machine.tensor_parallel=1, and torchrun started 2") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("world", "heads", "plan", "said"),
    [
        (3, 4, True, "4 key-value heads cannot be divided among 3"),
        (8, 2, True, "2 key-value heads"),
        (2, 4, False, "no tensor-parallel plan for llama"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(world, heads, plan, said, monkeypatch):
    for key, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", str(world))):
        monkeypatch.setenv(key, value)
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=heads)
    if not plan:
        config.base_model_tp_plan = None
    with pytest.raises(UserError, match=said):
        check_parts("base", config)
