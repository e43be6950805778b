"""The points of a sweep generate what they share once, and never write to one folder.

On 538a493 each point generated base, expert and tuned anew, and two points with one folder ended
in "Error executing job" (the tests of this file fail there).
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxytune import cli
from proxytune.experiment import runner
from proxytune.experiment.cells import HarnessCell, TaskCell
from proxytune.experiment.completions import read_completions
from proxytune.files import write_json, write_jsonl
from proxytune.generator import Generator
from proxytune.records import Completion, Decoding, Example, Prompt
from tests.commands import call

IDENTITY: dict[str, Any] = {
    "dataset": {"sha256": "d", "examples": 3},
    "system": "base",
    "members": {"base": {"id": "b", "weights": "w"}},
    "decoding": {"temperature": 0.8, "n": 2, "seed": 0},
}
EXAMPLES = [Example(name, Prompt(raw=name, user=name), target="") for name in ("a", "b", "c")]


def completion(example: str, sample: int, text: str = "x") -> Completion:
    return Completion(example, sample, text, text, [1], "stop")


def cell(sweep: Path, point: str, identity: dict[str, Any] = IDENTITY) -> TaskCell:
    """A claimed cell of one point of the sweep, two samples of three examples."""
    folder = sweep / point / "words" / "base"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", identity)
    made = TaskCell(None, "words", "base", folder, identity, EXAMPLES, Decoding(n=2))
    made.sweep = sweep
    return made


def answered(made: TaskCell, *samples: tuple[str, int]) -> TaskCell:
    write_jsonl(made.completions_path, [completion(*each) for each in samples])
    return made


ALL = [(name, sample) for name in "abc" for sample in (0, 1)]


def test_a_point_copies_what_another_one_with_the_same_identity_has(tmp_path):
    answered(cell(tmp_path, "alpha=0.5"), *ALL)
    own = answered(cell(tmp_path, "alpha=1.0"), ("b", 1))
    own.share()
    assert own.missing() == []
    assert own.copied == {"alpha=0.5": 3}
    stored = read_completions(own.completions_path)
    assert {(e, s) for e, found in stored.items() for s in found} == set(ALL)
    assert len(own.completions_path.read_text().splitlines()) == 6, "a sample is there twice"
    shutil.rmtree(tmp_path / "alpha=0.5")
    assert own.missing() == [], "it depends on the other point's folder"


def test_an_unfinished_neighbour_gives_what_it_has(tmp_path):
    """Its run may be going on, so its last line may be half written."""
    other = answered(cell(tmp_path, "alpha=0.5"), ("a", 0), ("a", 1), ("b", 0))
    with other.completions_path.open("a") as file:
        file.write('{"example_id": "b", "sam')
    third = answered(cell(tmp_path, "alpha=2.0"), ("b", 1))
    own = cell(tmp_path, "alpha=1.0")
    own.share()
    assert [example.id for example in own.missing()] == ["c"]
    assert own.copied == {"alpha=0.5": 1, "alpha=2.0": 1}
    assert len(read_completions(third.completions_path)["b"]) == 1, "the neighbour was changed"


@pytest.mark.parametrize(
    "other",
    [
        IDENTITY | {"decoding": {"temperature": 0.8, "n": 2, "seed": 1}},
        IDENTITY | {"decoding": {"temperature": 0.7, "n": 2, "seed": 0}},
        IDENTITY | {"dataset": {"sha256": "e", "examples": 3}},
        IDENTITY | {"members": {"base": {"id": "b", "weights": "other"}}},
        IDENTITY | {"alpha": 0.5},
        IDENTITY | {"formula": {"_target_": "f"}},
        IDENTITY | {"engine": {"name": "vllm", "version": "1"}},
    ],
)
def test_another_identity_s_completions_are_not_copied(other, tmp_path):
    answered(cell(tmp_path, "other", other), *ALL)
    own = cell(tmp_path, "own")
    own.share()
    assert len(own.missing()) == 3 and not own.copied
    assert not own.completions_path.exists()


def test_a_run_outside_of_a_sweep_looks_at_no_other_folder(tmp_path):
    answered(cell(tmp_path, "alpha=0.5"), *ALL)
    own = cell(tmp_path, "alpha=1.0")
    own.sweep = None
    own.share()
    assert len(own.missing()) == 3


def test_what_a_single_run_wrote_to_the_sweep_s_folder_is_read_too(tmp_path):
    single = answered(cell(tmp_path.parent, tmp_path.name), *ALL)
    assert single.folder == tmp_path / "words" / "base"
    own = cell(tmp_path, "alpha=1.0")
    own.share()
    assert own.missing() == [] and own.copied == {tmp_path.name: 3}


@pytest.mark.parametrize("name", ["cell.json", "completions.jsonl"])
@pytest.mark.parametrize("content", ["", "{", '{"members": 3}\n', "[]\n{}\n"])
def test_a_damaged_neighbour_is_passed_over_in_a_line(name, content, tmp_path, caplog):
    damaged = answered(cell(tmp_path, "alpha=0.5"), *ALL)
    (damaged.folder / name).write_text(content)
    answered(cell(tmp_path, "alpha=0.7"), *ALL)
    own = cell(tmp_path, "alpha=1.0")
    with caplog.at_level(logging.WARNING):
        own.share()
    assert own.missing() == [] and own.copied == {"alpha=0.7": 3}
    whole = (name, content) in [("completions.jsonl", ""), ("completions.jsonl", "{")]
    assert whole == (not caplog.messages), "an empty file, or half a line, is no damage"


@dataclass(frozen=True)
class SelfRun:
    """As lm-eval's tasks: the result counts for one limit."""

    def finished(self, folder: Path, limit: int | None) -> bool:
        path = folder / "result.json"
        return path.exists() and json.loads(path.read_text())["limit"] == limit


@pytest.mark.parametrize(("limit", "copied"), [(2, {"alpha=0.5": 1}), (3, {})])
def test_a_task_that_runs_itself_is_shared_once_it_has_finished(limit, copied, tmp_path):
    cells = []
    for point in ("alpha=0.5", "alpha=1.0"):
        folder = cell(tmp_path, point).folder
        cells.append(HarnessCell(SelfRun(), "words", "base", folder, IDENTITY, limit=limit))
        cells[-1].sweep = tmp_path
    first, own = cells
    (first.folder.parent / "examples.jsonl").write_text("{}\n")
    (first.folder / "completions.jsonl").write_text("{}\n")
    (first.folder / "result.json").write_text('{"limit": 2}')
    own.share()
    assert own.copied == copied
    assert (own.folder.parent / "examples.jsonl").exists() == bool(copied)
    assert (own.folder / "completions.jsonl").exists() == bool(copied)


# -- the command --------------------

SWEEP = ["-m", "task=[pocket_toxigen]", "limit=2", "report=false"]


@pytest.mark.slow
def test_a_sweep_over_alpha_generates_the_other_systems_once(tmp_path, monkeypatch):
    asked: list[int] = []
    generate = Generator.generate

    def counting(self, prompts, **more):
        asked.append(len(prompts))
        return generate(self, prompts, **more)

    monkeypatch.setattr(Generator, "generate", counting)
    shown = [*SWEEP[:-1], "report=true"]
    done = call(cli.run, *shown, "alpha=0.5,1.0,1.5", f"output_dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr
    assert asked == [2] * (3 * 1 + 1 * 3), "3 x proxy, 1 x expert, base, tuned"
    points = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(points) == 3
    assert f"report of the sweep: {tmp_path}/sweep/runs.html" in done.stdout
    # each point's folder stands alone
    moved = Path(shutil.move(points[2], tmp_path / "moved"))
    shutil.rmtree(tmp_path / "sweep")
    session = json.loads((moved / "run.json").read_text())["sessions"][-1]
    assert session["copied"].keys() == {f"{s}/pocket_toxigen" for s in ("base", "expert", "tuned")}
    # the others did not begin here; `proxytune watch` goes by it
    assert session["cells"]["proxy/pocket_toxigen"]["before"] == 0 and len(session["cells"]) == 1
    done = call(cli.run, *SWEEP[1:], "alpha=1.5", "stage=score", f"output_dir={moved}")
    assert done.returncode == 0, done.stderr
    done = call(cli.run, *SWEEP[1:], "alpha=1.5", f"output_dir={moved}", "limit=3")
    assert done.returncode == 0, done.stderr
    assert asked[6:] == [1] * 4
    done = call(cli.run, "task=[pocket_toxigen]", "report=false", "alpha=1.5", "limit=3",
                f"output_dir={tmp_path}/single")  # fmt: skip
    for system in ("base", "expert", "proxy", "tuned"):
        path = Path("pocket_toxigen") / system / "completions.jsonl"
        texts = [
            {key: {s: c.text for s, c in found.items()} for key, found in stored.items()}
            for stored in map(read_completions, (moved / path, tmp_path / "single" / path))
        ]
        assert texts[0] == texts[1]


@pytest.fixture
def started(monkeypatch) -> list[Path]:
    """The results folders of the points that were started."""
    found: list[Path] = []
    monkeypatch.setattr(
        runner, "run_experiment", lambda cfg, sweep=None: found.append(Path(cfg.output_dir))
    )
    return found


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decoding.batch_size=2,4"], "decoding.batch_size=2 and decoding.batch_size=4"),
        (["limit=1,2"], "limit=1 and limit=2"),
        (["alpha=0.5,1", "machine.threads=1,2"], "machine.threads=1 and machine.threads=2"),
        (["stage=generate,score", "alpha=1,2"], "stage=generate and stage=score"),
        (["machine=cpu,auto"], "machine=cpu and machine=auto"),
        (["output_dir=a,b", "tracking.mode=online,offline"], "tracking.mode="),
        (["alpha=0.5,1.0,0.5"], "points 1 and 3 of the sweep are the same"),
        (["decoding.batch_size=choice(2,4)"], "changes no completion"),
        (["decoding.batch_size=range(1,3)", "hydra.sweeper.max_batch_size=1"], "no completion"),
        (["output_dir=/tmp/a,/tmp/x/../a"], "both would write to /tmp/a"),
        (["output_dir=", "alpha=1,2"], "output_dir is empty"),
        (['output_dir="~/x"', "alpha=1,2"], "write $HOME"),
        (["alpha=0.5,nan"], "point 2 of the sweep: alpha=nan"),
        (["name=a,../b", "output_dir=/tmp/${name}"], "point 2 of the sweep: name='../b'"),
        (["systems=[base],[bass]"], "point 2 of the sweep: unknown system ['bass']"),
    ],
)
def test_points_that_are_wrong_or_meet_in_one_folder_are_refused(words, said, started, tmp_path):
    done = call(cli.run, "-m", "limit=1", f"output_dir={tmp_path}", *words)
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.count("error:") == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not started


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("words", "points"),
    [
        (["formula=proxy,dexperts"], 2),
        (["alpha=0.5,1.0,1.5"], 3),
        (["decoding.batch_size=2,4", "output_dir=OUT/${decoding.batch_size}"], 2),
        (["experiment=pocket,pocket_gsm", "output_dir=OUT/${name}"], 2),
        (["systems=[base],[tuned]", "decoding.seed=range(2)"], 4),
        (["alpha=1", "decoding.batch_size=3"], 1),
    ],
)
def test_points_with_folders_of_their_own_all_start(words, points, started, tmp_path, caplog):
    words = [word.replace("OUT", str(tmp_path)) for word in words]
    done = call(cli.run, "-m", f"output_dir={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    assert len(set(started)) == len(started) == points
    apart = any("${" in word for word in words)
    assert ("points in one alone share" in caplog.text) == apart


def test_a_point_is_not_written_through_a_link(started, tmp_path):
    """A sweep's folder may be a stranger's; the folder itself may be reached through a link."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "alpha=1.0").symlink_to(tmp_path)
    done = call(cli.run, "-m", "limit=1", f"output_dir={tmp_path}/sweep", "alpha=0.5,1.0")
    assert done.returncode == 1 and "alpha=1.0 is a symbolic link" in done.stderr
    assert not started


@pytest.mark.slow
def test_the_flag_may_stand_among_the_settings(started, tmp_path):
    done = call(cli.run, "limit=1", f"output_dir={tmp_path}", "-m", "alpha=0.5,1.0")
    assert done.returncode == 0, done.stderr
    assert len(started) == 2


@pytest.mark.slow
def test_an_alpha_s_cells_know_the_sweep(started, tmp_path, monkeypatch):
    sweeps: list[Path | None] = []
    monkeypatch.setattr(runner, "run_experiment", lambda cfg, sweep=None: sweeps.append(sweep))
    call(cli.run, "-m", "alpha=0.5,1.0", f"output_dir={tmp_path}")
    call(cli.run, "-m", "decoding.batch_size=2", f"output_dir={tmp_path}")
    call(cli.run, "alpha=0.5", f"output_dir={tmp_path}")
    assert sweeps == [tmp_path, tmp_path, None, None]
