"""Signals and closed pipes: one line, the shell's exit code, and an orderly end."""

import signal
import subprocess
import sys
import time

import pytest

from proxytune.files import ROOT

SLEEPER = """
import time
from proxytune.cli.guard import guarded

def command():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep({closing})
        print("closed", flush=True)

guarded(command)
"""


def start(program: str, **settings) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes, **settings)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "SIGHUP"),
    ],
)
def test_a_signal_is_one_line_and_everything_is_closed(number, code, said):
    with start(SLEEPER.format(closing=0.3)) as process:
        ready(process)
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)  # `timeout`, make and shells say it twice
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "closed\n")
    assert err == f"{said}; the same command goes on where this run stopped\n"


def test_a_second_interrupt_ends_at_once():
    with start(SLEEPER.format(closing=60)) as process:
        ready(process)
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted again: ended at once\n"


def test_nohup_is_heeded():
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with start(ignore + SLEEPER.format(closing=0)) as process:
        ready(process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_forked_child_dies_of_sigterm_as_ever():
    program = """
import os, signal, time
from proxytune.cli.guard import guarded

def command():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.3)  # a signal within fork itself would be lost
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

guarded(command)
"""
    with start(program) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "-15\n", "")


@pytest.mark.thinned(1)
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_one_line(lines):
    program = f"""
import time
from proxytune.cli.guard import guarded
time.sleep(0.3)
guarded(lambda: print("a line\\n" * {lines}))
"""
    with start(program) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == ("error: nobody reads the output any more; everything finished so far is kept\n")


@pytest.mark.slow
def test_an_interrupted_sandbox_does_not_run_the_rest():
    program = """
import signal, time
from proxytune.cli.guard import guarded
from tasks.sandbox import Sandbox

def command():
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGINT))
    Sandbox(timeout_s=1, workers=1, preimport=()).run(["import time; time.sleep(0.02)"] * 2000)

guarded(command)
"""
    begun = time.monotonic()
    with start(program) as process:
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGALRM, err
    assert time.monotonic() - begun < 15  # all of it would take 40 s and more
    assert "Traceback" not in err
