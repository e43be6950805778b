"""Several processes or GPUs for one run: what is refused, and what each device can hold.

All of it fails on 538a493, which knows neither replicas nor ranks, and counts every layer of a
spread model against its first device.
"""

from functools import partial

import hydra
import pytest
import torch
from tiny import tiny_model

from proxytune import cli
from proxytune.config.schema import register
from proxytune.config.specs import model_specs
from proxytune.engine import memory
from proxytune.engine.memory import LOGITS_COPIES, row_budget
from proxytune.errors import UserError
from proxytune.experiment.placement import check_placement
from proxytune.files import ROOT
from proxytune.members.cached import CachedModel
from proxytune.members.facts import layer_devices
from tests.commands import call

register()
ONE = {"base", "expert", "antiexpert"}


def config(*words: str):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", ["task=[pocket_toxigen]", *words])


def ranks(monkeypatch, world: int) -> None:
    """As in a process that torchrun started."""
    for key, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", str(world))):
        monkeypatch.setenv(key, value)


API = ["triple.base.api.base_url=http://127.0.0.1:1/v1", "triple.base.api.model=m"]


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("world", "words", "said"),
    [
        (1, ["machine.replicas=0"], "machine.replicas=0"),
        (1, ["machine.replicas=-3"], "at least 1"),
        (1, ["machine.tensor_parallel=0"], "machine.tensor_parallel=0"),
        (1, ["machine.tensor_parallel=2"], "torchrun --nproc_per_node 2 run.py"),
        (2, [], "machine.tensor_parallel=2"),
        (4, ["machine.tensor_parallel=2"], "torchrun started 4 processes"),
        (2, ["machine.tensor_parallel=2", "machine.replicas=2"], "exclude each other"),
        (2, ["machine.tensor_parallel=2", "machine.ray_address=auto"], "exclude each other"),
        (2, ["machine.tensor_parallel=2", "engine=vllm"], "engine.tensor_parallel_size"),
        (2, ["machine.tensor_parallel=2", "machine.cuda_graphs=true"], "cuda_graphs"),
        (2, ["machine.tensor_parallel=2", "machine.devices.base=auto"], "machine.devices.base"),
        (2, ["machine.tensor_parallel=2", "triple.expert.device=cpu"], "triple.expert.device"),
        (2, ["machine.tensor_parallel=2", "triple.expert.adapter=a"], "triple.expert.adapter"),
        (2, ["machine.tensor_parallel=2", *API], "behind an API"),
        (1, ["machine.replicas=2", *API], "behind an API"),
        (1, ["machine.replicas=2", "engine=vllm"], "setting of engine=own"),
        (1, ["machine.replicas=2", "triple.vocabulary=map"], "vocabulary=strict and special"),
        (1, ["+machine.max_memory.0=20GiB"], "machine=sharded"),
        (1, ["machine=sharded", "+machine.max_memory.gpu0=20GiB"], "gpu0"),
        (1, ["machine=sharded", "+machine.max_memory.0=lots"], "lots"),
        (1, ["machine=sharded", "+machine.max_memory.cpu=-1"], "cpu: -1"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_in_a_line(world, words, said, monkeypatch):
    monkeypatch.setattr("proxytune.experiment.placement.need", lambda *_: None)
    if world > 1:
        ranks(monkeypatch, world)
    with pytest.raises(UserError, match=said.replace(".", r"\.")) as refused:
        check_placement(config(*words), ONE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", [["machine.replicas=2"], ["machine.ray_address=auto"]])
def test_without_ray_the_line_says_what_to_install(words, monkeypatch):
    monkeypatch.setattr("proxytune.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"machine\.r.*needs ray.*proxytune\[ray\]"):
        check_placement(config(*words), ONE)


def test_a_plain_run_is_not_asked_for_ray(monkeypatch):
    monkeypatch.setattr("proxytune.errors.find_spec", lambda name: None)
    check_placement(config(), ONE)


def test_torchrun_without_the_setting_is_told_so_before_the_lock(monkeypatch, tmp_path):
    ranks(monkeypatch, 2)
    done = call(cli.run, f"output_dir={tmp_path}/run", "task=[pocket_toxigen]", "limit=1")
    assert done.returncode == 1 and done.stderr.startswith("error: machine.tensor_parallel=1")
    assert not (tmp_path / "run").exists()


def test_the_other_ranks_say_and_write_nothing_then(monkeypatch, tmp_path):
    ranks(monkeypatch, 2)
    monkeypatch.setenv("RANK", "1")
    done = call(cli.run, f"output_dir={tmp_path}/run", "task=[pocket_toxigen]", "limit=1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("setting", ["replicas=2", "tensor_parallel=2", "ray_address=auto"])
def test_a_server_is_one_process(setting):
    done = call(partial(cli._start, "serve"), "triple=pocket", "port=0", f"machine.{setting}")
    assert done.returncode == 1
    assert f"machine.{setting} is a setting of run.py" in done.stderr


def test_limits_of_memory_reach_the_spread_model_alone():
    cfg = config("machine=sharded", "+machine.max_memory={0: 20GiB, 1: 5GiB, cpu: 60GiB}")
    check_placement(cfg, ONE)
    specs = model_specs(cfg)
    assert specs["base"].max_memory == {0: "20GiB", 1: "5GiB", "cpu": "60GiB"}
    assert specs["expert"].max_memory is None


# -- rows --------------------

MAPS = [
    ({"": 0}, {"cuda:0": 4}),
    ({"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
      "model.layers.3": 1, "model.norm": 1, "lm_head": 1}, {"cuda:0": 1, "cuda:1": 3}),
    ({"model.layers.0": "cuda:2", "model.layers.1": "cuda:2", "model.layers.2": 3,
      "model.layers.3": 3}, {"cuda:2": 2, "cuda:3": 2}),
    ({"model": 1, "model.layers.3": "cpu"}, {"cuda:1": 3, "cpu": 1}),
    ({"model.layers.1": "disk", "model": 0}, {"cuda:0": 3, "cpu": 1}),
    (None, {"cpu": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("placed", "expected"), MAPS)
def test_each_device_counts_its_own_layers(placed, expected, monkeypatch):
    """What waits on the CPU or on disk runs where the ids are read: here the CPU."""
    model = tiny_model(layers=4)
    if placed is not None:
        model.hf_device_map = placed
    assert layer_devices(model) == {torch.device(name): n for name, n in expected.items()}
    member = CachedModel(model, 50)
    config = model.config
    layer = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    assert member.bytes_per_token() == {torch.device(d): n * layer for d, n in expected.items()}


def test_rows_go_by_the_fullest_device(monkeypatch):
    model = tiny_model(layers=4)
    model.hf_device_map = {"model.layers.0": 0, "model": 1}
    member = CachedModel(model, 50)
    per_token = member.bytes_per_token()
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert per_token[second] == 3 * per_token[first]
    rows = LOGITS_COPIES * 4 * 50
    free = {first: 1e9, second: 10 * 100 * per_token[second], torch.device("cpu"): 20 * rows}
    monkeypatch.setattr(memory, "_free_bytes", free.__getitem__)
    assert row_budget([member])(100) == 10
    free[first] = 5 * 100 * per_token[first]
    assert row_budget([member])(100) == 5
    free[torch.device("cpu")] = 2 * rows
    assert row_budget([member])(100) == 2
