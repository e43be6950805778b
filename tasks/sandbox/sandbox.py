"""Runs untrusted Python programs: all cores, each program shut in, with a verdict it cannot fake.

`sandbox_server.py` describes how a program is shut in and how success is decided, `sandbox_jail.py`
holds what the kernel is asked for; this module is the harness's side. Where the kernel refuses
namespaces (many containers) or has none (macOS), one line in the log says what is left.

A time-out depends on the machine's load unless one sees to it. Three things do:

- The clock of a program leaves out the time that it waited for a processor (Linux).
- First, all programs run on all cores on a short leash; nearly all end at once.
- The rest then runs one to a core with nothing else of ours running, for a tenth longer than the
  limit: a program that has not ended by then is too slow by any measure, and counts as a time-out.
  One that passes above the limit is run once more, alone, and this run counts.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "timeout"]

SERVER = Path(__file__).with_name("sandbox_server.py")

# What programs of HumanEval's kind import; loaded once in the fork server.
COMMON_MODULES = (
    "abc", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "operator",
    "random", "re", "statistics", "string", "time", "typing",
)  # fmt: skip
# How much longer than its limit a program gets on a core of its own before it is given up.
GRACE = 1.1
SETUP_S = 300.0


@dataclass(frozen=True)
class Program:
    """What to run.

    Attributes:
        code: the untrusted part.
        test: trusted code that runs afterwards in the same namespace, between two checks that the
            untrusted part has not replaced what tests rely on. It is compiled on its own, so no
            open bracket or decorator at the end of `code` reaches it.
    """

    code: str
    test: str = ""


@dataclass(frozen=True)
class Verdict:
    """How a program went.

    Attributes:
        outcome: "passed" (the end was reached), "failed" or "timeout".
        detail: the exception or the way it died, for people to read.
        seconds: how long it ran, without waiting for a processor.
    """

    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the program reached its end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """How programs are shut in.

    Attributes:
        timeout_s: a program's time.
        memory_bytes: its address space, the fork server's included.
        disk_bytes: its throw-away directory.
        file_bytes: one file in it.
        threads: its threads, where the kernel can count them (not for root).
        workers: programs at a time; None for one per core.
        python: the interpreter; None for this one. Another one needs Python 3.8 or later.
        preimport: modules that the fork server loads for all programs.
        native: allow ctypes and new code objects, which big libraries need.
        hash_seed: Python's; it fixes the order of sets, on which some programs' verdicts depend.
        isolate: False leaves the namespaces out, to test what is left.
    """

    timeout_s: float = 3.0
    memory_bytes: int = 2 << 30
    disk_bytes: int = 64 << 20
    file_bytes: int = 32 << 20
    threads: int = 64
    workers: int | None = None
    python: str | None = None
    preimport: tuple[str, ...] = COMMON_MODULES
    native: bool = False
    hash_seed: int = 1
    isolate: bool = True

    def run(self, programs: Sequence[Program | str]) -> list[Verdict]:
        """Runs programs, all cores used, and returns their verdicts in order.

        Raises:
            RuntimeError: the interpreter cannot be started or lacks a module of `preimport`.
        """
        todo = [Program(p) if isinstance(p, str) else p for p in programs]
        count = min(self.workers or usable_cores(), len(todo))
        if count == 0:
            return []
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(_Server(self)) for _ in range(count)]
            leash = min(self.timeout_s, max(0.1, self.timeout_s / 30))
            verdicts = _share(servers, todo, range(len(todo)), leash)
            slow = [i for i, verdict in verdicts.items() if _unsettled(verdict)]
            lonely = count == 1 or len(slow) == 1
            limit = self.timeout_s * (1.0 if lonely else GRACE)
            verdicts |= _share(servers, todo, slow, limit)
            for index in slow:
                verdict = verdicts[index]
                if verdict is None or (verdict.passed and verdict.seconds > self.timeout_s):
                    verdict = servers[0].run(todo[index], self.timeout_s)
                if verdict is None:
                    verdict = Verdict("failed", "the program ended the sandbox itself")
                verdicts[index] = verdict
        return [verdict for _, verdict in sorted(verdicts.items()) if verdict is not None]


def run_programs(
    programs: Sequence[Program | str], timeout_s: float = 3.0, **settings: Any
) -> list[Verdict]:
    """Runs programs in a `Sandbox` with these settings."""
    return Sandbox(timeout_s=timeout_s, **settings).run(programs)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _unsettled(verdict: Verdict | None) -> bool:
    return verdict is None or verdict.outcome == "timeout"


def _share(
    servers: "Sequence[_Server]",
    programs: Sequence[Program],
    indices: Sequence[int],
    limit_s: float,
) -> dict[int, Verdict | None]:
    """Runs the programs at `indices` on all servers; None for one that took its server with it."""
    waiting = deque(indices)

    def work(server: _Server) -> Iterator[tuple[int, Verdict | None]]:
        while True:
            try:
                index = waiting.popleft()
            except IndexError:
                return
            yield index, server.run(programs[index], limit_s)

    with ThreadPoolExecutor(len(servers)) as pool:
        done = pool.map(lambda server: list(work(server)), servers)
        try:
            return {index: verdict for part in done for index, verdict in part}
        finally:
            waiting.clear()  # an interrupt does not wait for the programs that have not begun


class _Server:
    """One fork server, started when first needed and again after it has died."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._workdir: str | None = None

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, program: Program, limit_s: float) -> Verdict | None:
        """Runs one program; None when the server did not live to tell."""
        channel = self._channel or self._start()
        # The server's own clock ends the program; this one is for a server that hangs.
        channel.settimeout(limit_s * 20 + 60)
        try:
            _send(channel, {"code": program.code, "test": program.test, "limit_s": limit_s})
            reply = _receive(channel)
        except OSError:
            reply = None
        if reply is None:
            self._stop()
            return None
        return Verdict(reply["outcome"], reply["detail"], reply["seconds"])

    def _start(self) -> socket.socket:
        box = self._sandbox
        python = box.python or sys.executable
        self._workdir = tempfile.mkdtemp(prefix="sandbox-")
        channel, theirs = socket.socketpair()
        with theirs:
            command = [python, "-s", "-B", str(SERVER), str(theirs.fileno())]
            try:
                self._process = subprocess.Popen(
                    command,
                    env=_environment(self._workdir, box.hash_seed),
                    cwd=self._workdir,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                raise RuntimeError(f"the sandbox's interpreter {python}: {error}") from error
        channel.settimeout(SETUP_S)
        self._channel = channel
        settings = {
            "preimport": box.preimport,
            "memory_bytes": box.memory_bytes,
            "disk_bytes": box.disk_bytes,
            "file_bytes": box.file_bytes,
            "open_files": 64,
            "threads": box.threads,
            "native": box.native,
            "isolate": box.isolate,
            "workdir": self._workdir,
            "home": str(Path.home()),
        }
        try:
            _send(channel, settings)
            hello = _receive(channel)
        except OSError:
            hello = None
        if hello is None or "error" in hello:
            reason = hello["error"] if hello else self._last_words()
            self._stop()
            raise RuntimeError(f"the sandbox's interpreter {python} did not start: {reason}")
        _log_isolation(hello["refused"], hello["seccomp"], tuple(hello["writable"]))
        return channel

    def _last_words(self) -> str:
        assert self._process is not None and self._process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        os.set_blocking(self._process.stderr.fileno(), False)
        return (self._process.stderr.read() or b"").decode("utf-8", "replace")[-2000:]

    def _stop(self) -> None:
        """Ends the server and with it everything that it runs; a later `run` starts another."""
        if self._channel is not None:
            self._channel.close()  # for the server, the sign to go
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None
        if self._workdir is not None:
            shutil.rmtree(self._workdir, ignore_errors=True)
            self._workdir = None


def _environment(workdir: str, hash_seed: int) -> dict[str, str]:
    """What a program sees of the environment: nothing of ours but where libraries are."""
    fixed = {
        "PATH": os.defpath,
        "HOME": workdir,
        "TMPDIR": workdir,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": workdir,
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return fixed | {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}


@functools.cache
def _log_isolation(refused: str, seccomp: bool, writable: tuple[str, ...]) -> None:
    """Says once how well programs are shut in."""
    if not refused and seccomp and not writable:
        log.info("sandbox: namespaces without network, read-only mounts, system call filter")
        return
    missing = [
        f"no namespaces ({refused}): only an audit hook guards files and network"
        if refused
        else "",
        "" if seccomp else "no system call filter",
        f"still writable: {', '.join(writable)}" if writable else "",
    ]
    log.warning("sandbox, less than wanted: %s", "; ".join(part for part in missing if part))


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    """One message: eight bytes of length, then JSON (the server never sends pickles)."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("!Q", len(body)) + body)


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message, or None at the end."""
    head = _read(channel, 8)
    body = head and _read(channel, struct.unpack("!Q", head)[0])
    return json.loads(body) if body else None


def _read(channel: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
