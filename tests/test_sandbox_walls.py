"""What a program can reach of the machine: docs/sandbox.md lists it, with the tests of this file.

What issue 14 names worked on 538a493, as root or as any user.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tasks.sandbox import Program, Sandbox, Verdict, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")
ROOT = Path(__file__).parents[1]
TEST = "assert f(2) == 4"
HONEST = "\ndef f(x): return 2 * x"
MODES = pytest.mark.parametrize("isolate", [True, False], ids=["namespaces", "limits"])


def run(*codes: str, **settings: object) -> list[Verdict]:
    """The verdicts on programs whose test is right, so that only what they try decides."""
    programs = [Program(code + HONEST, TEST) for code in codes]
    return Sandbox(workers=1, **settings).run(programs)  # pyright: ignore[reportArgumentType]


def needs_namespaces() -> None:
    probe = "import os\nassert os.getpid() < 100"
    if not run(probe)[0].passed:
        pytest.skip("this kernel refuses namespaces")


def needs_file_walls(isolate: bool) -> None:
    """Skips where neither namespaces nor Landlock are to be had: then only the hook is left."""
    if not run("import ctypes", isolate=isolate)[0].passed:
        pytest.skip("this kernel has neither namespaces nor Landlock")


@pytest.mark.thinned(1)
@MODES
def test_nothing_outside_is_written(isolate: bool, tmp_path: Path) -> None:
    """Fails on 538a493: FIFOs; without namespaces also sqlite3, mkfifo, mknod, native code."""
    needs_file_walls(isolate)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    new = f"{tmp_path}/new"
    attacks = {
        "fifo": f"open({str(fifo)!r}, 'wb', buffering=0).write(b'x')",
        "mkfifo": f"import os\nos.mkfifo({new!r})",
        "mknod": f"import os\nos.mknod({new!r})",
        "sqlite3": f"import sqlite3\nsqlite3.connect({new!r}).execute('create table t(a)')",
        "attach": (
            "import sqlite3\n"
            "c = sqlite3.connect('in.db')\n"
            f"c.execute('attach ? as o', ({new!r},))\n"
            "c.execute('create table o.t(a)')\n"
            "c.commit()"
        ),
        "pyarrow": f"import pyarrow\npyarrow.OSFile({new!r}, 'wb').write(b'x')",
        "native create": (
            f"import ctypes\nassert ctypes.CDLL(None).open({new.encode()!r}, 65, 0o600) >= 0"
        ),
        "native truncate": (
            f"import ctypes\nassert ctypes.CDLL(None).truncate({bytes(victim)!r}, 0) == 0"
        ),
        "native unlink": f"import ctypes\nassert ctypes.CDLL(None).unlink({bytes(victim)!r}) == 0",
        "shared memory": "import _posixshmem\n_posixshmem.shm_open('/sandbox-new', 66, 0o600)",
    }
    verdicts = run(*attacks.values(), isolate=isolate, timeout_s=10)
    with pytest.raises(BlockingIOError):
        os.read(reader, 9)
    os.close(reader)
    assert {n: v for n, v in zip(attacks, verdicts, strict=True) if v.passed} == {}
    assert victim.read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "victim"]
    assert not Path("/dev/shm/sandbox-new").exists()


@pytest.mark.thinned(1)
@MODES
def test_files_of_the_user_cannot_be_read(isolate: bool, tmp_path: Path) -> None:
    """Fails on 538a493, also with the interpreter's environment in the home directory."""
    needs_file_walls(isolate)
    secret = tmp_path / "secret"
    secret.write_text("canary")
    home = [p for p in (Path.home() / ".bashrc", Path.home() / ".profile") if p.is_file()]
    for path in (secret, ROOT / "README.md", Path(__file__), *home):
        for code in (
            f"open({str(path)!r}).read()",
            f"import ctypes\nassert ctypes.CDLL(None).open({bytes(path)!r}, 0) >= 0",
        ):
            assert not run(code, isolate=isolate)[0].passed, path


@pytest.mark.thinned(1)
@MODES
def test_no_socket_reaches_the_machine(
    isolate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails on 538a493: a datagram of a socketpair reaches any socket of the file system."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("d")
        server.setblocking(False)
        path = f"{tmp_path}/d"
        attacks = [
            f"import _socket\na, b = _socket.socketpair(1, 2)\na.sendto(b'x', {path!r})",
            f"import _socket\na, b = _socket.socketpair(1, 2)\na.connect({path!r})\na.send(b'x')",
            f"import _socket\na, b = _socket.socketpair(1, 5)\na.sendto(b'x', {path!r})",
            "import _socket\na, b = _socket.socketpair(1, 1)\na.listen(1)",
            f"import socket\nsocket.socket(1, 1).connect({path!r})",
            "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))",
        ]
        verdicts = run(*attacks, isolate=isolate)
        assert not any(v.passed for v in verdicts), verdicts
        with pytest.raises(BlockingIOError):
            server.recv(9)
    pair = "import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'"
    assert run(pair, isolate=isolate)[0].passed, "asyncio needs such a pair"


@pytest.mark.thinned(1)
@MODES
def test_no_memory_outlives_or_exceeds_a_program(isolate: bool) -> None:
    """Fails on 538a493: System V memory stays, and memfds are not counted."""
    needs_file_walls(isolate)
    libc = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    attacks = [
        f"{libc}assert libc.shmget(4242, 1 << 20, 0o1666) >= 0",
        f"{libc}assert libc.msgget(4242, 0o1666) >= 0",
        f"{libc}assert libc.semget(4242, 1, 0o1666) >= 0",
        f"{libc}assert libc.mq_open(b'/sandbox', 66, 0o600, None) >= 0",
        "import os\nos.memfd_create('x')",
        f"{libc}assert libc.syscall(447, 0) >= 0",
    ]
    assert not any(v.passed for v in run(*attacks, isolate=isolate))


@MODES
def test_no_signal_and_no_scheduling_reaches_other_processes(isolate: bool) -> None:
    """Before 2026-11-26, a descriptor's owner could be any process: it was killed by SIGKILL."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        attacks = [
            f"import os, time\nfrom fcntl import *\na, b = socket.socketpair()\n{own}"
            "fcntl(a, 10, 9)\nfcntl(a, F_SETFL, os.O_ASYNC)\nb.send(b'x')\ntime.sleep(0.1)"
            for pid in (1, other.pid)
            for own in (
                f"fcntl(a, F_SETOWN, {pid})\n",
                f"fcntl(a, 15, struct.pack('ii', 1, {pid}))\n",
                f"ioctl(a, 0x8901, struct.pack('i', {pid}))\n",
            )
        ]
        attacks += [
            "import os\nos.setpriority(os.PRIO_USER, 0, 19)",
            "import os\nos.sched_setaffinity(1, {0})",
            f"import os\nos.sched_setscheduler({other.pid}, os.SCHED_IDLE, os.sched_param(0))",
        ]
        verdicts = run(*(f"import socket, struct\n{text}" for text in attacks), isolate=isolate)
        assert other.poll() is None
        other.kill()
    assert [v.outcome for v in verdicts] == ["refused"] * len(attacks), verdicts
    own = "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))"
    assert run(own, isolate=isolate)[0].passed


def test_threads_are_limited_for_root_too() -> None:
    """Fails on 538a493 as root: 20,000 threads."""
    needs_namespaces()
    threads = (
        "import _thread, time\n"
        "_thread.stack_size(32768)\n"
        "for n in range(200): _thread.start_new_thread(time.sleep, (5,))"
    )
    (verdict,) = run(threads)
    if verdict.passed:  # root's interpreter in a folder that only root can read
        pytest.skip("the programs have to run as root; the log says so")
    assert "thread" in verdict.detail


def test_inside_there_are_five_devices_and_no_folders_of_others() -> None:
    """Fails on 538a493: all devices of the machine are there, and writable for root."""
    needs_namespaces()
    # the interpreter may be in a home directory or below /tmp; then the way to it can be seen
    ways: dict[str, set[str]] = {}
    for folder in (sys.prefix, sys.base_prefix, str(ROOT)):
        _, top, *rest = Path(folder).parts
        ways.setdefault(f"/{top}", set()).update(rest[:1])
    look = (
        f"import os, stat, sys\nways = {ways}\n"
        "names = ['full', 'null', 'random', 'shm', 'urandom', 'zero']\n"
        "assert sorted(os.listdir('/dev')) == names and os.listdir('/dev/shm') == []\n"
        "open('/dev/null', 'w').write('x')\n"
        "assert open('/dev/urandom', 'rb').read(1)\n"
        "assert open('/dev/zero', 'rb').read(1) == bytes(1)\n"
        "for name in ('/home', '/run', '/var', '/sys', '/boot', '/mnt'):\n"
        "    assert not os.path.exists(name) or set(os.listdir(name)) <= ways[name], name\n"
        "assert set(os.listdir('/tmp')) <= ways.get('/tmp', set())\n"
        "assert os.listdir('/proc') == ['self'] and os.listdir('.') == []\n"
        "assert sorted(os.listdir('/proc/self')) == ['cmdline', 'exe', 'maps']\n"
        "assert os.path.samefile('/proc/self/exe', sys.executable)\n"
        "assert not os.path.exists('/etc/shadow')\n"
        "assert os.getuid() != 0"
    )
    (verdict,) = run(look)
    assert verdict.passed, verdict.detail
    pool = "from multiprocessing.pool import ThreadPool\nThreadPool(2)"
    assert run(pool)[0].outcome == "refused", "semaphores have names that outlive a program"
    make = "import os\nos.mknod('x', 0o666 | 0o020000, os.makedev(1, 5))"
    assert run(make)[0].outcome == "refused"


@pytest.mark.slow
@MODES
def test_kill_9_of_the_harness_leaves_nothing(isolate: bool) -> None:
    """Fails on 538a493: an empty folder is left for each server."""
    before = set(Path(tempfile.gettempdir()).glob("sandbox-*"))
    code = (
        "from tasks.sandbox import run_programs\n"
        f"run_programs(['open(\"x\", \"w\")', 'while True: pass'], timeout_s=60, isolate={isolate})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    harness = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (servers := _servers_of(harness.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    harness.send_signal(signal.SIGKILL)
    harness.wait()
    while any(Path(f"/proc/{pid}/stat").exists() for pid in servers):
        assert time.monotonic() < deadline, "a server is left running"
        time.sleep(0.05)
    assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= before


def _servers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children]


WRAPPERS = {
    "nobody": ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
    "bubblewrap": [
        *("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/"),
        *("--proc", "/proc", "--dev", "/dev"),
    ],
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_walls_need_no_root_and_stand_inside_of_others(wrapper: str) -> None:
    """The system's Python runs the sandbox as another user, or inside of bubblewrap."""
    command = WRAPPERS[wrapper]
    python = shutil.which("python3", path="/usr/bin:/bin")
    if os.geteuid() != 0 or not python or not shutil.which(command[0]):
        pytest.skip(f"needs root, {command[0]} and a Python of the system")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(ROOT / "tasks" / "sandbox", Path(folder) / "tasks" / "sandbox")
        (Path(folder) / "tasks" / "__init__.py").touch()
        run_as(command, python, folder)


def run_as(command: list[str], python: str, folder: str) -> None:
    code = (
        f"import sys\nsys.path.insert(0, {folder!r})\n"
        "from tasks.sandbox import run_programs\n"
        "look = 'import os\\nassert len(os.listdir(\"/dev\")) == 6 and os.getpid() < 100'\n"
        "print(run_programs([look])[0].outcome)"
    )
    environment = {"HOME": "/", "PATH": os.defpath}
    done = subprocess.run(
        [*command, python, "-B", "-c", code], capture_output=True, text=True, env=environment
    )
    if "SyntaxError" in done.stderr or "ImportError" in done.stderr:
        pytest.skip("the system's Python is too old for the harness")
    assert done.stdout.strip() == "passed", done.stderr[-500:]


def test_every_guarantee_has_its_test() -> None:
    text = (ROOT / "docs" / "sandbox.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) > 12
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_root_and_missing_walls_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from tasks.sandbox import sandbox

    sandbox._log_isolation.cache_clear()
    with caplog.at_level("INFO", logger="tasks.sandbox.sandbox"):
        run_programs([""], isolate=False)
    assert "no namespaces" in caplog.text
    sandbox._log_isolation.cache_clear()
    sandbox._log_isolation("refused", False, False, ("/mnt",), True)
    assert "an audit hook" in caplog.text and "as root" in caplog.text and "/mnt" in caplog.text
