"""The forecast of a run's end, and what is shown where there is no terminal."""

import io
import logging

import pytest
from rich.console import Console
from rich.progress import Progress

from proxytune.experiment.forecast import Forecast, spoken
from proxytune.experiment.progress import RunProgress


def forecast(*cells):
    return Forecast([(*cell, 100) for cell in cells])


def run(found: Forecast, index: int, now: float, count: int, each: float) -> float:
    """Lets examples of a cell end one after the other; the time after the last."""
    found.begin(index, now)
    for _ in range(count):
        now += each
        found.advance(index, now)
    return now


def test_nothing_is_said_before_the_first_batch_can_be_judged():
    found = forecast(("proxy", "gsm8k"))
    run(found, 0, 0.0, 9, 2.0)
    assert found.seconds() is None
    found.advance(0, 20.0)  # a tenth of the cell
    assert found.seconds() == pytest.approx(90 * 2.0)


def test_a_cell_of_another_task_is_scaled_by_what_another_system_took():
    found = forecast(("base", "a"), ("base", "b"), ("proxy", "a"), ("proxy", "b"))
    now = run(found, 0, 0.0, 100, 1.0)
    now = run(found, 1, now, 100, 5.0)
    now = run(found, 2, now, 50, 3.0)
    # proxy on b: three times of base's, so 15 s each
    assert found.seconds() == pytest.approx(50 * 3.0 + 100 * 15.0)


def test_without_another_system_a_task_takes_what_its_system_takes():
    found = forecast(("base", "a"), ("base", "b"), ("proxy", "c"))
    run(found, 0, 0.0, 100, 2.0)
    assert found.seconds() == pytest.approx(100 * 2.0 + 100 * 2.0)


def test_what_an_earlier_session_finished_is_not_left_and_tells_no_speed():
    found = forecast(("base", "a"))
    found.finished_before(0, 80)
    assert found.left == 20 and found.seconds() is None
    run(found, 0, 1000.0, 10, 4.0)
    assert found.seconds() == pytest.approx(10 * 4.0)
    run(found, 0, 0.0, 10, 1.0)
    assert found.seconds() == 0


def test_loading_between_cells_counts_for_no_cell():
    found = forecast(("base", "a"), ("proxy", "a"))
    now = run(found, 0, 0.0, 100, 1.0) + 500  # loads
    run(found, 1, now, 50, 2.0)
    assert found.seconds() == pytest.approx(50 * 2.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (40.4, "40 s"),
        (89, "89 s"),
        (95, "2 min"),
        (3599, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (187_000, "2 d 3 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert spoken(seconds) == words


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    return Clock()


def progress(clock, terminal, file=None):
    console = Console(file=file or io.StringIO(), force_terminal=terminal)
    bars = Progress(console=console, disable=True)
    cells = [("base", "gsm8k", 300), ("proxy", "gsm8k", 300)]
    return RunProgress(cells, bars, terminal=terminal, clock=clock)


def work(shown, clock, examples):
    """Loads for 42 seconds; then an example of 50 tokens of the first cell ends each second."""
    with shown.loading("base"):
        clock.now += 42
    (cell, _) = shown.cells
    cell.begin()
    for _ in range(examples):
        clock.now += 1
        cell.tokens(50)
        cell.advance()


def test_without_a_terminal_there_is_a_line_a_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    work(progress(clock, terminal=False), clock, 300)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["base: loading its models", "base: loaded in 42 s"]
    assert 5 <= len(lines[2:]) <= 6  # 300 s of work, and the cell's end
    assert lines[3].startswith("base gsm8k: 78 of 300 examples; 3,900 tokens, 50/s; the run: 522")
    assert lines[3].endswith("about 9 min left")
    assert lines[-1].startswith("base gsm8k: 300 of 300 examples")


def test_on_a_terminal_the_log_stays_empty_and_the_run_has_a_bar(clock, caplog):
    caplog.set_level(logging.INFO)
    shown = progress(clock, terminal=True)
    work(shown, clock, 60)
    assert not caplog.records
    (whole,) = [task for task in shown.bars.tasks if task.description == "the run"]
    assert whole.completed == 60 and whole.total == 600
    assert whole.fields["left"] == "about 9 min left"
