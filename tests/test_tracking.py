import json
import struct
import time

import pandas as pd
import pytest

from proxytune.experiment.tracking import Tracker, WandbTracker, make_tracker, sample_completions
from proxytune.files import write_jsonl
from proxytune.records import Completion, Example, Metric, Prompt, Score

METRICS = [
    Metric("gsm8k", "proxy", "acc", 0.25, 100, 100, ci_low=0.175, ci_high=0.343),
    Metric("gsm8k", "base", "acc", 0.1, 100, 100),
]


def records(path):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # a block's last bytes are padding when no header fits
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def complete(path, seconds=30):
    """The records once the last one is there: wandb writes them in a process of its own."""
    end = time.monotonic() + seconds
    while True:
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < end, f"{path} never ended"
        time.sleep(0.05)


def make(directory, **changes):
    settings = {
        "kind": "wandb",
        "project": "proxytune",
        "experiment": "pocket",
        "mode": "offline",
        "config": {"alpha": 1.0, "task": {"gsm8k": {"limit": None}}},
        "directory": directory,
    }
    return make_tracker(**(settings | changes))


def test_disabled_is_silent_and_does_nothing(tmp_path):
    tracker = make(tmp_path, kind="disabled")
    assert type(tracker) is Tracker
    tracker.log_metrics(METRICS)
    tracker.log_table(pd.DataFrame())
    tracker.log_completions(pd.DataFrame)
    tracker.log_throughput({})
    tracker.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"kind": "mlflow"}, {"mode": "onlin"}])
def test_a_misspelt_setting_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        make(tmp_path, **bad)


@pytest.mark.slow
def test_an_offline_run_holds_everything(tmp_path):
    tracker = make(tmp_path)
    tracker.log_throughput({"proxy/gsm8k": {"tokens": 300, "seconds": 2.0}})
    tracker.log_metrics(METRICS)
    tracker.log_table(pd.DataFrame([{"task": "gsm8k", "base": 10.0, "tuned": float("nan")}]))
    tracker.log_completions(lambda: pd.DataFrame([{"prompt": "2+2", "proxy": "4"}]))
    tracker.finish()
    tracker.log_metrics(METRICS)  # after the end: nothing, and no error
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = complete(path)
    run = next(r.run for r in found if r.HasField("run"))
    assert (run.project, run.run_group, run.display_name) == ("proxytune", "pocket", "pocket")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["alpha"] == 1.0 and config["task"] == {"gsm8k": {"limit": None}}
    logged = {}
    for record in found:
        if record.HasField("history"):
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                logged[key] = json.loads(item.value_json)
    assert logged["gsm8k/proxy/acc"] == 0.25
    assert logged["gsm8k/proxy/acc_low"] == 0.175
    assert logged["throughput/proxy/gsm8k/tokens_per_second"] == 150
    tables = {
        p.name.split("_")[0]: json.loads(p.read_text()) for p in tmp_path.rglob("*.table.json")
    }
    assert tables["comparison"]["data"] == [["gsm8k", 10.0, None]]
    assert tables["completions"]["columns"] == ["prompt", "proxy"]
    assert tables["completions"]["data"] == [["2+2", "4"]]


def test_a_failing_wandb_never_loses_a_run(tmp_path, caplog, monkeypatch):
    import wandb

    def broken(**_):
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = make(tmp_path)
    assert isinstance(tracker, WandbTracker)
    tracker.log_metrics(METRICS)
    tracker.finish()
    assert "no network" in caplog.text


def test_a_failure_in_the_middle_ends_the_tracking_only(tmp_path, caplog, monkeypatch):
    import wandb

    class Run:
        calls = 0

        def log(self, values):
            Run.calls += 1
            raise RuntimeError("disk full")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = make(tmp_path)
    tracker.log_metrics(METRICS)
    tracker.log_metrics(METRICS)
    tracker.finish()
    assert Run.calls == 1 and caplog.text.count("disk full") == 1


def test_sample_completions_stand_side_by_side(tmp_path):
    examples = [Example(str(i), Prompt(raw=f"Q{i}", user=""), target=i) for i in range(3)]
    write_jsonl(tmp_path / "t" / "examples.jsonl", examples)
    for system in ("base", "proxy"):
        text = f"{system} \ud800"  # a lone surrogate, as a byte-level model may write it
        made = [Completion(str(i), 0, f"{text}{i}", "", [1], "eos") for i in (2, 1, 0)]
        write_jsonl(tmp_path / "t" / system / "completions.jsonl", made)
        scored = [Score(str(i), {"acc": float(i == 1)}) for i in range(3)]
        write_jsonl(tmp_path / "t" / system / "scores.jsonl", scored)
    table = sample_completions(tmp_path, ["t"], per_task=2)
    assert table[["id", "base", "proxy", "proxy_score"]].to_numpy().tolist() == [
        ["0", "base ?0", "proxy ?0", 0.0],
        ["1", "base ?1", "proxy ?1", 1.0],
    ]
