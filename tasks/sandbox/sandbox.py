"""Runs untrusted Python programs on all cores, each in isolation.

`sandbox_server.py` describes the isolation, `sandbox_judge.py` how success is decided. This
module starts the servers and hands them programs. If the kernel refuses namespaces (many
containers) or has none (macOS), one line in the log names the protection that is missing.

Three measures keep time-outs independent of the machine's load:

- The clock of a program does not count the time that it waited for a processor (Linux).
- First, all programs run on all cores with a short limit; nearly all end within it.
- The others then run one to a core, for a tenth longer than the limit. A program that has not ended
  by then counts as a time-out. A program that passes, but after the limit, runs once more, alone,
  and this run counts.
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
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.sandbox.requirements import Requirements, requirements

log = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "timeout", "refused"]

SERVER = Path(__file__).with_name("sandbox_server.py")

# Modules that HumanEval's programs import; the fork server loads them once.
COMMON_MODULES = (
    "abc", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "operator",
    "random", "re", "statistics", "string", "time", "typing",
)  # fmt: skip
# On a core of its own, a program may run this many times its limit.
GRACE = 1.1
SETUP_S = 300.0  # a server may take this long to start


@dataclass(frozen=True)
class Program:
    """A program and its test.

    Attributes:
        code: the untrusted part, in HumanEval prompt and completion.
        test: trusted code that runs afterwards. Without one, a program passes at its end.
        prompt: the task's own text, with which `code` begins. The judge takes helper functions
            from it, so that the program cannot replace them.
        entry_point: the function that the prompt leaves to write.
        executes: the test has the program's text as a string and runs it by `exec(text, names)`
            (DS-1000); `code` is then empty.
        together: judges in the program's own process; weaker, see docs/sandbox.md.
    """

    code: str
    test: str = ""
    prompt: str = ""
    entry_point: str | None = None
    executes: bool = False
    together: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of one program.

    Attributes:
        outcome: "passed" (it reached its end), "failed", "timeout", or "refused": it failed because
            of something that the sandbox does not allow, so it is not known to be wrong.
        detail: the exception, or how the process died, for people to read.
        seconds: how long it ran, without the time that it waited for a processor.
        together: whether judge and program were one process.
    """

    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    together: bool = False

    @property
    def passed(self) -> bool:
        """Whether the program reached its end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """The limits and the interpreter of isolated programs.

    Attributes:
        timeout_s: seconds that a program may run.
        memory_bytes: its address space, including the fork server's.
        disk_bytes: the size of its temporary directory.
        file_bytes: the size of one file in it.
        threads: its number of threads; not enforced when we run as root.
        workers: programs that run at once; None for one per core.
        python: the interpreter, Python 3.8 or later; None for the one that runs this.
        preimport: modules that the fork server loads for all programs.
        native: allows ctypes and new code objects, which big libraries need.
        hash_seed: PYTHONHASHSEED. It fixes the order of sets, on which some verdicts depend.
        isolate: False uses no namespaces, to test the other protections.
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
        """Runs programs on all cores and returns their verdicts in order.

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
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _unsettled(verdict: Verdict | None) -> bool:
    return verdict is None or verdict.outcome == "timeout"


def _share(
    servers: "Sequence[_Server]",
    programs: Sequence[Program],
    indices: Sequence[int],
    limit_s: float,
) -> dict[int, Verdict | None]:
    """Runs the programs at `indices` on all servers; None for a program that killed its server."""
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
            waiting.clear()  # after an interrupt, start no further programs


class _Server:
    """One fork server. It is started when first needed, and again after it has died."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._workdir: str | None = None  # where there are no namespaces; the server deletes it

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, program: Program, limit_s: float) -> Verdict | None:
        """Runs one program; None if the server died meanwhile."""
        known = requirements(program)
        if known is not None:
            verdict = self._run(program, known, limit_s)
            if verdict is None or verdict.outcome != "together":
                return verdict
        return self._run(program, None, limit_s)

    def _run(self, program: Program, known: Requirements | None, limit_s: float) -> Verdict | None:
        channel = self._channel or self._start()
        # The server's clock ends the program. This time-out is for a server that hangs.
        channel.settimeout(limit_s * 20 + 60)
        try:
            job = {"code": program.code, "limit_s": limit_s, "together": known is None}
            if known is None:
                _send(channel, {**job, "test": program.test})
            else:
                helpers = sorted(set(known.names) - set(known.entry_points))
                helpers = [] if program.prompt or known.executes else helpers
                _send(channel, {**job, "imports": known.imports, "helpers": helpers})
            reply = _receive(channel)
            if known is not None and reply is not None and "wants" in reply:
                _send(channel, {**known._asdict(), "test": program.test})
                reply = _receive(channel)
        except OSError:
            reply = None
        if reply is None:
            self._stop()
            return None
        return Verdict(reply["outcome"], reply["detail"], reply["seconds"], known is None)

    def _start(self) -> socket.socket:
        box = self._sandbox
        python = box.python or sys.executable
        channel, theirs = socket.socketpair()
        with theirs:
            command = [python, "-s", "-B", str(SERVER), str(theirs.fileno())]
            try:
                self._process = subprocess.Popen(
                    command,
                    env=_environment(box.hash_seed),
                    cwd="/",
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
        self._workdir = hello["workdir"]
        _log_isolation(
            hello["refused"],
            hello["landlock"],
            hello["seccomp"],
            tuple(hello["writable"]),
            hello["root"],
        )
        return channel

    def _last_words(self) -> str:
        assert self._process is not None and self._process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        os.set_blocking(self._process.stderr.fileno(), False)
        return (self._process.stderr.read() or b"").decode("utf-8", "replace")[-2000:]

    def _stop(self) -> None:
        """Ends the server and everything that it runs; a later `run` starts another one."""
        if self._channel is not None:
            self._channel.close()  # the server ends when its channel closes
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


def _environment(hash_seed: int) -> dict[str, str]:
    """The environment variables of a program: none of ours except the library path.

    The server adds those that name the program's own folder.
    """
    fixed = {
        "PATH": os.defpath,
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return fixed | {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}


@functools.cache
def _log_isolation(
    refused: str, landlock: bool, seccomp: bool, writable: tuple[str, ...], root: bool
) -> None:
    """Logs once how well programs are isolated."""
    if not refused and seccomp and not writable and not root:
        log.info("sandbox: namespaces without network, a root of its own, system call filter")
        return
    files = "Landlock guards the files" if landlock else "only an audit hook guards the files"
    missing = [
        f"no namespaces ({refused}): {files}" if refused else "",
        "" if seccomp else "no system call filter",
        f"still writable: {', '.join(writable)}" if writable else "",
        "programs run as root; use an account of its own" if root else "",
    ]
    log.warning("sandbox, less than wanted: %s", "; ".join(part for part in missing if part))


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message: eight bytes of length, then JSON (pickles would not be safe)."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("!Q", len(body)) + body)


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    """Receives the next message; None at the end."""
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
