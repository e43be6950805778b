"""Replicas: whoever makes a sample, it is the same; the driver has each once.

The fast tests have a crew in this process, which answers in any order and forgets what a killed
replica knew. The slow ones start Ray, and kill its actors and the driver by SIGKILL.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from proxytune.errors import UserError
from proxytune.experiment.generate import ModelPool
from proxytune.experiment.ray_crew import gpus_of_replica
from proxytune.experiment.replicas import Ran, Replica, _chunks, open_replicas
from proxytune.files import ROOT
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from proxytune.roles import MEMBERS

POCKET = ROOT / "pocket" / "models"
SPECS = {
    role: ModelSpec(str(POCKET / role), dtype="float32", format=PromptFormat(kind))
    for role, kind in (("base", "raw"), ("expert", "chat"), ("antiexpert", "raw"))
}
SYSTEMS = {"base": MEMBERS["base"], "proxy": MEMBERS["proxy"]}
PROMPTS = [f"Question: what is {n} plus {n + 3}?\nAnswer:" for n in range(11)]
KEYS = [f"example {n}" for n in range(11)]
SETTINGS = {"max_new_tokens": 12, "temperature": 0.8, "n": 2, "seed": 3}


def make_pool() -> ModelPool:
    return ModelPool(SPECS, SYSTEMS, alpha=1.0, cuda_graphs=False)


class HereCrew:
    """Replicas in this process; calls are made when they are waited for, in a random order."""

    def __init__(self, size: int, kill: frozenset[int] = frozenset()) -> None:
        self.size = size
        self.calls: list[tuple[int, str, int]] = []
        self._kill = kill  # the numbers of the calls before which the replica is killed
        self._make = partial(Replica, make_pool, 1)
        self._replicas = [self._make() for _ in range(size)]
        self._choose = random.Random(5)
        self._waiting: dict[int, tuple] = {}

    def submit(self, replica, method, system, *arguments):
        ticket = len(self.calls)
        self.calls.append((replica, method, len(arguments[0]) if method == "generate" else 0))
        self._waiting[ticket] = (replica, method, system, *arguments)
        return ticket

    def wait(self, tickets):
        return self._choose.choice(list(tickets))

    def answer(self, ticket):
        replica, *call = self._waiting.pop(ticket)
        if ticket in self._kill:
            self._replicas[replica] = self._make()
        return self._replicas[replica].call(*call)


@pytest.fixture(scope="module")
def alone():
    """Completions and log-likelihoods of one process: system -> both."""
    pairs = [(prompt, [5, 6, 7 + n]) for n, prompt in enumerate(PROMPTS)]
    found = {}
    for system in SYSTEMS:
        generator = make_pool().open(system)
        completions = generator.generate(PROMPTS, sample_keys=KEYS, **SETTINGS)
        found[system] = (completions, pairs, generator.loglikelihood(pairs))
    return found


@pytest.mark.thinned(1)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kill", [frozenset(), frozenset({3, 5, 6})])
def test_completions_do_not_depend_on_the_replicas(alone, size, system, kill):
    crew = HereCrew(size, kill)
    ran = [Ran() for _ in range(size)]
    replicas = open_replicas(crew, system, {r: SPECS[r] for r in SYSTEMS[system]}, ran)
    completions, pairs, likelihoods = alone[system]
    finished = []
    generated = replicas.generate(
        PROMPTS, sample_keys=KEYS, batch_size=2, on_finish=finished.append, **SETTINGS
    )
    assert generated == completions
    key = [(each.prompt_index, each.sample) for each in finished]
    assert sorted(key) == [(n, s) for n in range(11) for s in range(2)], "one is there twice"
    assert {replica for replica, method, _ in crew.calls if method == "generate"} == set(
        range(size)
    )
    assert sum(each.prompts for each in ran) == 11
    assert sum(each.tokens for each in ran) == sum(len(each.token_ids) for each in completions)
    found = replicas.loglikelihood(pairs)
    for (total, greedy), (wanted, likeliest) in zip(found, likelihoods, strict=True):
        assert total == pytest.approx(wanted, abs=1e-4) and greedy == likeliest


def test_a_bad_prompt_is_named_by_its_own_number_and_nothing_is_sent():
    crew = HereCrew(2)
    replicas = open_replicas(crew, "base", {"base": SPECS["base"]}, [Ran(), Ran()])
    sent = len(crew.calls)
    with pytest.raises(UserError, match="prompt 7 is"):
        replicas.generate([*([[5, 6]] * 7), [5] * 5000], max_new_tokens=2)
    with pytest.raises(UserError, match="sample_keys"):
        replicas.generate(PROMPTS, sample_keys=KEYS[1:])
    with pytest.raises(UserError, match="temperature"):
        replicas.generate(PROMPTS, temperature=-1.0)
    assert len(crew.calls) == sent
    assert replicas.generate([], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("count", "replicas", "rows", "samples"),
    [
        (1, 4, 32, 1),
        (11, 2, 2, 2),
        (1000, 2, 16, 1),
        (500, 8, 256, 1),
        (7, 3, 1, 20),
        (64, 1, 8, 1),
    ],
)
def test_chunks_cover_every_prompt_once(count, replicas, rows, samples):
    chunks = _chunks(count, replicas, rows, samples)
    assert [index for chunk in chunks for index in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= max(1, 2 * rows // samples)
    assert len(chunks) >= min(replicas, count / max(1, rows // (2 * samples)))


@pytest.mark.parametrize(
    ("devices", "replicas", "total", "each"),
    [
        ({"base": None, "expert": None}, 4, 8, 1),
        ({"base": "cuda:0", "expert": "cuda:1"}, 4, 8, 2),
        ({"base": "auto", "expert": None}, 2, 8, 4),
        ({"base": "auto", "expert": "cuda:2"}, 4, 8, 3),
        ({"base": "cpu", "expert": "cpu"}, 4, 8, 0),
        ({"base": None, "expert": None}, 4, 0, 0),
    ],
)
def test_the_gpus_of_a_replica_follow_from_the_placement(devices, replicas, total, each):
    specs = {role: ModelSpec("m", device=device) for role, device in devices.items()}
    assert gpus_of_replica(specs, replicas, total) == each


# -- Ray --------------------

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'proxytune[ray]'")
RUN = ["task=[pocket_triviaqa]", "limit=60", "systems=[expert,proxy]", "decoding=default",
       "report=false", "machine.threads=1"]  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *RUN, f"output_dir={folder}", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> None:
    """Waits for a run that is to succeed."""
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said


def texts(folder: Path) -> dict[str, dict[tuple[str, int], str]]:
    """Cell -> (example, sample) -> text; a sample that is there twice fails."""
    found = {}
    for path in sorted(folder.glob("*/*/completions.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(folder))] = {
            (row["example_id"], row["sample"]): row["raw_text"] for row in rows
        }
        assert len(found[str(path.parent.relative_to(folder))]) == len(rows)
    return found


def actors(driver: int) -> list[int]:
    """The processes of a driver's replicas."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (path.parent / "cmdline").read_bytes()
            session = int(path.read_text().rpartition(")")[2].split()[3])
        except OSError:
            continue
        if command.startswith(b"ray::_Actor") and session == driver:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    end(start(folder))
    return folder


KILLS = 10  # of actors, and of drivers; at random moments


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_actors_cost_nothing(whole, tmp_path):
    choose = random.Random(0)
    kills, number = 0, 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / str(number)
        process = start(folder, "machine.replicas=2", "decoding.batch_size=4")
        while process.poll() is None and kills < KILLS:
            time.sleep(choose.uniform(0.2, 3))
            running = actors(process.pid)
            if running and any(folder.glob("*/*/cell.json")):
                os.kill(choose.choice(running), signal.SIGKILL)
                kills += 1
        end(process)
        assert texts(folder) == texts(whole)
        session = json.loads((folder / "run.json").read_text())["sessions"][-1]
        assert len(session["replicas"]) == 2
        assert sum(each["prompts"] for each in session["replicas"]) == 120


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_drivers_go_on_where_they_stopped(whole, tmp_path):
    choose = random.Random(1)
    kills, number = 0, 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / str(number)
        for _ in range(3):
            process = start(folder, "machine.replicas=2", "decoding.batch_size=4")
            while process.poll() is None and not any(folder.glob("*/*/completions.jsonl")):
                time.sleep(0.2)
            time.sleep(choose.uniform(0, 2))
            kills += process.poll() is None
            process.kill()
            process.wait()
            texts(folder)
            deadline = time.monotonic() + 60
            while actors(process.pid) and time.monotonic() < deadline:
                time.sleep(0.5)
            assert not actors(process.pid), "replicas outlive their driver"
        end(start(folder, "machine.replicas=2"))
        assert texts(folder) == texts(whole)
