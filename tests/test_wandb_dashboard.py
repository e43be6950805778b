import importlib
import json
import sys
from pathlib import Path

import pytest

from proxytune.experiment import tracking
from proxytune.records import Metric
from proxytune.roles import COMPARED

GOLDEN = Path(__file__).parent / "golden" / "wandb_dashboard.json"
METRICS = ["gsm8k/acc", "truthfulqa_open/true"]


@pytest.fixture(scope="module")
def dashboard():
    scripts = str(Path(__file__).parent.parent / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module("wandb_dashboard")
    sys.path.remove(scripts)


@pytest.mark.thinned(1)
def test_the_specification_is_the_recorded_one(dashboard):
    """Record anew, after looking at it in W&B: python tests/test_wandb_dashboard.py."""
    assert dashboard.specification("me", "proxytune", METRICS) == json.loads(GOLDEN.read_text())


def test_the_panels_read_what_the_tracker_logs(dashboard, monkeypatch):
    text = json.dumps(dashboard.specification("me", "proxytune", METRICS))
    logged = {}
    tracker = object.__new__(tracking.WandbTracker)
    tracker._run = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    systems = COMPARED
    tracker.log_metrics([Metric("gsm8k", s, "acc", 0.5, 1, 1) for s in systems])
    tracker.log_throughput({f"{s}/gsm8k": {"tokens": 1, "seconds": 1.0} for s in systems})
    assert len(logged) == 4 + 12
    for key in logged:
        if not key.endswith(("/tokens", "/seconds")):
            assert key in text, key
    assert '"comparison"' in text and '"completions"' in text


def test_showing_needs_no_login(dashboard, capsys):
    dashboard.main(["--entity", "me", "--metric", "gsm8k/acc"])
    assert "nothing was saved" in capsys.readouterr().out


def test_saving_needs_a_login_and_says_so(dashboard, monkeypatch):
    monkeypatch.setattr(dashboard, "logged_in", lambda: False)
    with pytest.raises(ValueError, match="wandb login"):
        dashboard.main(["--entity", "me", "--save"])


def test_a_metric_without_its_task_is_refused(dashboard):
    with pytest.raises(ValueError, match="task/metric"):
        dashboard.main(["--entity", "me", "--metric", "acc"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    module = importlib.import_module("wandb_dashboard")
    GOLDEN.write_text(json.dumps(module.specification("me", "proxytune", METRICS), indent=1) + "\n")
