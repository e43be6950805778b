"""Attacks on the sandbox: none passes, none harms the harness, nothing is left running."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.sandbox import Program, Sandbox, Verdict, run_programs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def test_an_honest_program_passes_and_says_nothing() -> None:
    (verdict,) = run_programs(["import math, random, numpy\nassert math.sqrt(4) == 2"])
    assert (verdict.outcome, verdict.detail) == ("passed", "")


def test_a_failure_tells_why() -> None:
    verdicts = run_programs(["1/0", "import os; os._exit(7)", "x = = 1", "int('\\ud800')", "x\0"])
    assert verdicts[0].detail == "ZeroDivisionError: division by zero"
    assert verdicts[1].detail == "exited with 7 before its end was reached"
    assert verdicts[2].detail.startswith("SyntaxError")
    assert all(verdict.outcome == "failed" for verdict in verdicts)


def test_odd_texts_do_not_break_the_harness() -> None:
    texts = ["", "\ud800", "\0", "x" * 2_000_000, "(" * 100_000, "\t\n \r", "é = 1", "#" * 100]
    outcomes = [verdict.outcome for verdict in run_programs(texts)]
    assert outcomes == [
        "passed",
        "failed",
        "failed",
        "failed",
        "failed",
        "passed",
        "passed",
        "passed",
    ]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("isolate", [True, False], ids=["namespaces", "limits"])
def test_attacks_on_the_machine(
    isolate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"secret-{os.getpid()}"
    monkeypatch.setenv("SANDBOX_TEST_SECRET", secret)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    attacks = {
        "fork bomb": "import os\nwhile True: os.fork()",
        "processes": "import multiprocessing as m\nm.Process(target=print).start()",
        "shell": "import subprocess; subprocess.run(['true'], check=True)",
        "threads": "import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (9,))",
        "100 GB": "x = bytearray(100 << 30)",
        "memory by and by": "x = []\nwhile True: x.append(bytearray(10 << 20))",
        "big file": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "kill the parent": "import os; os.kill(os.getppid(), 9)",
        "kill the harness": f"import os; os.kill({os.getpid()}, 9)",
        "kill all": "import os; os.kill(-1, 9)",
        "parent's environment": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "harness's environment": f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        "harness's memory": f"open('/proc/{os.getpid()}/mem', 'rb+').read(1)",
        "own environment": f"import os; assert {secret!r} in os.environ.values()",
        "write outside": f"open({str(victim)!r}, 'w').write('x')",
        "delete outside": f"import os; os.remove({str(victim)!r})",
        "rename outside": f"import os; os.rename({str(victim)!r}, {str(victim) + '2'!r})",
        "write by a directory's descriptor": (
            "import os\n"
            "root = os.open('/', os.O_RDONLY)\n"
            f"os.open({str(victim)[1:]!r}, os.O_WRONLY | os.O_TRUNC, dir_fd=root)"
        ),
        "own memory by a directory's descriptor": (
            "import os\n"
            "root = os.open('/', os.O_RDONLY)\n"
            "os.open('proc/self/mem', os.O_RDWR, dir_fd=root)"
        ),
        "write by a descriptor of the own directory": (
            "import os\n"
            "here = os.open('.', os.O_RDONLY)\n"
            "os.makedirs('a/b/c/d'); os.chdir('a/b/c/d')\n"
            "os.open('../sandbox-test-was-here', os.O_WRONLY | os.O_CREAT, dir_fd=here)"
        ),
        "write to /tmp": "open('/tmp/sandbox-test-was-here', 'w')",
        "write to /dev/shm": "open('/dev/shm/sandbox-test-was-here', 'w')",
        "socket": "import socket; socket.socket()",
        "socket by name": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "native code": "import ctypes; ctypes.CDLL(None).getpid()",
        "too many files": "x = [open('/dev/null') for _ in range(10000)]",
    }
    before = _processes()
    verdicts = run_programs(list(attacks.values()), memory_bytes=512 << 20, isolate=isolate)
    assert {k: v for k, v in zip(attacks, verdicts, strict=True) if v.passed} == {}
    assert victim.read_text() == "untouched"
    assert not Path("/tmp/sandbox-test-was-here").exists()
    assert not Path("/dev/shm/sandbox-test-was-here").exists()
    assert _left_running(before) == []


def test_a_full_disk_is_only_its_own() -> None:
    fill = "for i in range(99): open(f'f{i}', 'wb').write(bytes(30 << 20))"
    shut = "import os; os.chmod('.', 0)"
    look = "import os; assert os.listdir('.') == []; open('x', 'w')"
    verdicts = run_programs([fill, look, look, shut, look], workers=1)
    assert verdicts[0].outcome == "failed"
    assert all(v.passed for v in verdicts[1:]), "nothing of one program is left for the next"


@pytest.mark.slow
def test_endless_programs_time_out_and_end() -> None:
    loops = ["while True: pass", "import time; time.sleep(99)", "import signal\nsignal.pause()"]
    stubborn = (
        "import signal\n"
        "for number in range(1, 32):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "while True: pass"
    )
    before = _processes()
    start = time.monotonic()
    verdicts = run_programs([*loops, stubborn], timeout_s=0.5)
    assert [verdict.outcome for verdict in verdicts] == ["timeout"] * 4
    assert time.monotonic() - start < 20
    assert _left_running(before) == []


@pytest.mark.slow
def test_megabytes_of_output_go_nowhere() -> None:
    chatter = (
        "import sys\n"
        "for _ in range(200):\n"
        "    print('x' * 2**20)\n"
        "    sys.stderr.write('y' * 2**20)"
    )
    loud = "raise Exception('x' * 50_000_000)"
    passed, failed = run_programs([chatter, loud])
    assert passed.passed
    assert failed.outcome == "failed" and len(failed.detail) <= 3000


def test_many_programs_keep_their_order_and_use_all_workers() -> None:
    programs = ["" if i % 3 else f"raise ValueError({i})" for i in range(60)]
    verdicts = run_programs(programs, workers=3)
    assert [v.passed for v in verdicts] == [bool(i % 3) for i in range(60)]
    assert verdicts[57].detail == "ValueError: 57"
    assert run_programs([]) == []


@pytest.mark.slow
def test_load_does_not_make_a_time_out() -> None:
    """A program that needs half of its limit ends in time on a machine several times overbooked."""
    work = "import time\nwhile time.process_time() < 0.4: pass"
    burn = [sys.executable, "-c", "while True: pass"]
    load = [subprocess.Popen(burn) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        verdicts = run_programs([work, work], timeout_s=0.8)
    finally:
        for process in load:
            process.kill()
            process.wait()
    if sys.platform == "linux":
        assert [v.outcome for v in verdicts] == ["passed", "passed"]


def test_a_program_above_the_limit_is_not_saved_by_the_grace() -> None:
    slow = "import time; time.sleep(0.6)"
    verdicts = run_programs([slow, slow, ""], timeout_s=0.5)
    assert [v.outcome for v in verdicts] == ["timeout", "timeout", "passed"]


def test_a_server_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.sandbox import sandbox

    real = sandbox._Server.run
    crashes = iter([None])

    def crash_once(self: sandbox._Server, program: Program, limit_s: float) -> Verdict | None:
        if program.code == "x = 1" and next(crashes, 1) is None:
            real(self, program, limit_s)
            assert self._process is not None
            os.killpg(self._process.pid, 9)
        return real(self, program, limit_s)

    monkeypatch.setattr(sandbox._Server, "run", crash_once)
    assert [v.passed for v in run_programs(["x = 1", "y = 2"], workers=1)] == [True, True]


def test_an_interpreter_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No such file"):
        Sandbox(python="/no/such/python").run([""])
    with pytest.raises(RuntimeError, match="cannot import no_such_module"):
        Sandbox(preimport=("no_such_module",)).run([""])


def test_verdicts_do_not_depend_on_the_run() -> None:
    """Sets iterate in the same order in every run, and random numbers differ between programs."""
    order = "raise ValueError(list({'a', 'b', 'c', 'd', 'e'}))"
    first, second = run_programs([order]), run_programs([order])
    assert first[0].detail == second[0].detail


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_inside_there_is_nothing_to_see() -> None:
    probe = (
        "import os\n"
        "assert os.listdir('/proc') == ['self'], 'processes'\n"
        "assert sorted(os.listdir('/proc/self')) == ['cmdline', 'exe', 'maps'], 'processes'\n"
        "assert os.getpid() < 100, 'no PID namespace'\n"
        "assert os.getuid() != 0, 'root'\n"
        "for path in ('/etc', '/usr', '/var/tmp', '/dev/shm', '/'):\n"
        "    assert not os.access(path, os.W_OK), path\n"
    )
    verdict = run_programs([probe])[0]
    if "processes" in verdict.detail or "namespace" in verdict.detail:
        pytest.skip("this kernel refuses namespaces")
    assert verdict.passed, verdict.detail


def test_the_system_call_filter_works_without_the_audit_hook() -> None:
    """With native code allowed, the kernel still refuses what the hook cannot see."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no filter for this platform")
    probe = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.socket(2, 1, 0) == -1 and ctypes.get_errno() == errno.EPERM\n"
        "assert libc.fork() == -1 and ctypes.get_errno() == errno.EPERM\n"
        "assert libc.kill(1, 9) == -1 and ctypes.get_errno() == errno.EPERM\n"
        "assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == errno.EPERM\n"
        "import threading\n"
        "t = threading.Thread(target=int); t.start(); t.join()\n"
    )
    verdict = run_programs([probe], native=True)[0]
    assert verdict.passed, verdict.detail


def _processes() -> set[int]:
    if not Path("/proc").is_dir():
        return set()
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}


def _left_running(before: set[int]) -> list[str]:
    """Processes of the sandbox that are not in `before`, after a moment to die in."""
    left: list[str] = []
    for _ in range(50):
        left = []
        for pid in _processes() - before:
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if "sandbox_server" in line and parent in (os.getpid(), 1):
                left.append(line)
        if not left:
            return []
        time.sleep(0.1)
    return left
