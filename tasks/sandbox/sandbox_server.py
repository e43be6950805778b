"""The fork server that runs untrusted programs in isolation; `sandbox.py` (the harness) starts it.

It is a script that uses the standard library only and is valid for Python 3.8, because it also runs
under the interpreter of another environment (DS-1000's pinned libraries). It imports the modules
that programs are likely to need and isolates itself. Each program then costs a fork instead of the
start of an interpreter.

The isolation (Linux; `sandbox_root.py`, `sandbox_limits.py`): new mount, PID, network, IPC, UTS
and, unless we are root, user namespaces; a root directory in memory that shows the system's and the
interpreter's folders read-only; and one writable place, a small memory file system, new for each
program. The server is the init of the PID namespace, so one call kills everything. Each program
gets resource limits, no capabilities, and a seccomp filter that refuses processes, sockets, signals
to others, tracing and mounting. An audit hook refuses the same to Python code, with a better
message. Where the kernel refuses namespaces (a container), Landlock guards the files, and where it
lacks Landlock, the hook alone. docs/sandbox.md lists what holds on which platform.

A program gets two processes: its own, which has never seen the test (`sandbox_program.py`), and the
judge's (`sandbox_judge.py`), which reads the test from the harness itself.
"""

# The server imports as little as possible before it isolates itself, so no pathlib.
# ruff: noqa: PTH108, PTH116, PTH208

import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time

import sandbox_child as child
import sandbox_judge as judge
import sandbox_limits as limits
import sandbox_program as program
import sandbox_root as view
import sandbox_together as together

SETUP_S = 60.0  # a judge's process may take this long to read its test


def receive(channel):
    """Receives one message from the harness: eight bytes of length, then JSON. None at the end."""
    head = read_exactly(channel, 8)
    body = head and read_exactly(channel, struct.unpack("!Q", head)[0])
    return json.loads(body) if body else None


def read_exactly(channel, size):
    """Reads `size` bytes; None if the other side has closed the channel."""
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(channel, message):
    """Sends one message to the harness."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("!Q", len(body)) + body)


def waited_s(proc, pid):
    """Seconds that a process has waited for a processor; 0 if the kernel does not say."""
    try:
        descriptor = os.open(f"{pid}/schedstat", os.O_RDONLY, dir_fd=proc)
        try:
            return int(os.read(descriptor, 100).split()[1]) / 1e9
        finally:
            os.close(descriptor)
    except (OSError, TypeError, IndexError, ValueError):
        return 0.0


class Clock:
    """The time that a job's processes have used.

    It does not count the time that they waited for a processor, so other load on the machine does
    not cause a time-out. (Program and judge work in turns, so their waiting adds up.)
    """

    def __init__(self, limit_s, proc):
        self.limit_s, self.pids = limit_s, []
        self._proc, self._start = proc, time.monotonic()

    def used(self):
        """Seconds; on an overloaded machine, at least a tenth of the time on the wall."""
        wall = time.monotonic() - self._start
        return max(wall - sum(waited_s(self._proc, pid) for pid in self.pids), wall / 10)

    def pause(self, seconds):
        """Takes back `seconds`, which were ours."""
        self._start += seconds


def readable(harness, channel, clock):
    """Waits until a channel can be read: True, or False at the time limit.

    Raises:
        EOFError: the harness has gone.
    """
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(harness, 0)  # reports only that the harness has closed it
    used = 0.0
    while used < clock.limit_s:
        events = poll.poll((clock.limit_s - used) * 1000 + 1)
        if any(descriptor == harness.fileno() for descriptor, _ in events):
            raise EOFError
        if events:
            return True
        used = clock.used()
    return False


class Job:
    """One program: the processes that it needs, and its verdict.

    Attributes:
        pids: the processes that have been started; the first one is the program's.
    """

    def __init__(self, job, harness, config):
        self._job, self._harness, self._config = job, harness, config
        self._clock = Clock(job["limit_s"], config["proc"])
        self.pids = self._clock.pids

    def run(self):
        """Runs the job.

        Returns: outcome, detail, seconds.
        """
        outcome, detail = self._together() if self._job["together"] else self._apart()
        return outcome, detail, self._clock.used()

    def _fork(self, run, *arguments):
        pid = os.fork()
        if pid == 0:
            run(*arguments)
        self.pids.append(pid)

    def _late(self):
        return "timeout", f"no end after {self._clock.limit_s:g} s"

    def _together(self):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._fork(together.run_together, self._job, self._config, theirs.fileno())
            nonce = read_exactly(ours, child.NONCE_BYTES)
            if nonce is None:
                return "failed", "the program's process could not be set up"
            ours.sendall(b".")
            return self._last_words(ours, b"", nonce)

    def _last_words(self, channel, data, proof=None):
        """What a program's process says at its end: the proof, or an exception."""
        while len(data) <= 2 * child.DETAIL_BYTES:
            if not readable(self._harness, channel, self._clock):
                return self._late()
            part = channel.recv(1 << 12)
            data += part
            if data == proof:
                return "passed", ""
            if not part:
                break
        if data[:1] in (b"E", b"X") and len(data) <= 2 * child.DETAIL_BYTES:
            outcome = "refused" if data[:1] == b"X" else "failed"
            return outcome, data[1:].decode("utf-8", "replace").strip()
        return "failed", "the program wrote to the verdict's channel" if data else ""

    def _apart(self):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._fork(program.run_apart, self._job, self._config, theirs.fileno())
            if not readable(self._harness, ours, self._clock):
                return self._late()
            word = ours.recv(1)
            if word != b".":
                return self._last_words(ours, word) if word else ("failed", "")
            return self._judge(ours)

    def _judge(self, channel):
        """Starts the judge's process, which reads the test itself, and waits for its verdict."""
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                send(self._harness, {"wants": "test"})
                ends = self._harness.fileno(), self._config, channel.fileno(), theirs.fileno()
                self._fork(judge.run_judge, *ends, self._job["limit_s"])
            channel.close()
            ours.settimeout(SETUP_S)
            if read_exactly(ours, 1) is None:
                os._exit(1)  # the test is read by nobody, so the next job would not be understood
            self._clock.pause(time.monotonic() - start)
            if not readable(self._harness, ours, self._clock):
                return self._late()
            verdict = receive(ours)
        if verdict is None:
            return "failed", "the judge's process ended without a verdict"
        return verdict["outcome"], verdict["detail"]


def bury(pids, alone):
    """Kills all processes that a job has left, and reaps them.

    Returns: how the program's own process ended, in words.
    """
    try:
        if alone:
            os.kill(-1, signal.SIGKILL)
        else:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # nothing left to kill
    end = "ended before its end was reached"
    while True:
        try:
            found, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return end
        if found == pids[0]:
            if os.WIFSIGNALED(status):
                end = f"killed by signal {os.WTERMSIG(status)}"
            else:
                end = f"exited with {os.WEXITSTATUS(status)} before its end was reached"


def serve(harness, config):
    """Runs jobs until the harness closes the channel; never returns."""
    workdir, fresh = config["workdir"], None
    while True:
        job = receive(harness)
        if job is None:
            os._exit(0)
        if config["namespaces"] and fresh is None:
            options = f"size={config['disk_bytes']},nr_inodes=4096,mode=700"
            if config["uid"] is not None:
                options += f",uid={config['uid']},gid={config['uid']}"
            flags = view.MS_NOSUID | view.MS_NODEV | view.MS_NOEXEC
            view.mount("sandbox", workdir, "tmpfs", flags, options)
            fresh = state(workdir)
        work = Job(job, harness, config)
        try:
            outcome, detail, seconds = work.run()
        except EOFError:
            bury(work.pids, config["namespaces"])
            os._exit(0)
        end = bury(work.pids, config["namespaces"])
        if not config["namespaces"]:
            empty(workdir)
        elif state(workdir) != fresh:
            limits.call(limits.LIBC.umount2, os.fsencode(workdir), view.MNT_DETACH)
            fresh = None
        if outcome == "died":
            outcome, detail = "failed", end
        reply = {"outcome": outcome, "detail": detail or ("" if outcome == "passed" else end)}
        send(harness, {**reply, "seconds": seconds})


def state(directory):
    """A value that changes whenever anything is done to a directory."""
    found = os.stat(directory)
    return found.st_ctime_ns, found.st_mode, found.st_nlink, found.st_size, os.listdir(directory)


def empty(directory):
    """Deletes a program's files, if its directory is not a file system of its own."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def main(descriptor):
    """Sets the server up (imports, namespaces, file system) and runs jobs."""
    # Every descriptor of this process is low, so that its children can close them all.
    os.dup2(descriptor, 3, inheritable=False)
    os.closerange(4, max(descriptor + 1, child.OPEN_FILES))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (child.OPEN_FILES, hard))
    harness = socket.socket(fileno=3)
    config = receive(harness)
    if config is None:
        os._exit(0)
    for name in config["preimport"]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            send(harness, {"error": f"{sys.executable} cannot import {name}: {error}"})
            os._exit(0)
    report = isolate(harness, config)
    for name in ("HOME", "TMPDIR", "MPLCONFIGDIR"):
        os.environ[name] = config["workdir"]
    tempfile.tempdir = None  # a module may have looked it up while it was imported
    if limits.LINUX:
        limits.call(limits.LIBC.prctl, limits.PR_SET_DUMPABLE, 0, 0, 0, 0)
    send(harness, report)
    gc.freeze()  # garbage collection in a fork then copies no pages of the server
    serve(harness, config)


def isolate(harness, config):
    """Forks a child that is confined as far as the kernel allows; returns in the child only.

    It adds to `config`: namespaces, landlock, fence (the only folder to write in, if there is no
    mount namespace), workdir, uid (the programs' user id, None for ours), own_user (whether they
    have one to themselves, so that its threads can be limited), seccomp (the filter), and proc (a
    descriptor of /proc, None without).

    Returns: what the harness is told.
    """
    refused = view.why_no_namespaces() if config["isolate"] else "not wanted"
    root, writable = os.geteuid() == 0, []
    if refused:
        workdir = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
        uid = view.unused_uid({p for path in view.interpreter_paths() for p in view.parents(path)})
        if uid is not None:
            os.chown(workdir, uid, uid)
    else:
        workdir, uid = view.WORKDIR, view.enter_namespaces()
    pid = os.fork()
    if pid:
        # Only a child is in the new PID namespace. This process waits for its end, and cleans up.
        harness.close()
        os.waitpid(pid, 0)
        if refused:
            shutil.rmtree(workdir, ignore_errors=True)
        os._exit(0)
    if limits.LINUX:
        limits.call(limits.LIBC.prctl, limits.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    config.update(namespaces=not refused, workdir=workdir, uid=uid, proc=None, landlock=False)
    if refused:
        config.update(fence=workdir, landlock=view.landlock(workdir))
    else:
        assert os.getpid() == 1, "bury() would kill everything of this user"
        mounts = view.enter_root()
        config.update(fence=None, proc=os.open("/proc", os.O_RDONLY))
        writable = view.lock_file_system(mounts)
    config["own_user"] = uid is not None or not (refused or root)
    config["seccomp"] = limits.working_filter()
    return {
        "refused": refused,
        "landlock": config["landlock"],
        "seccomp": config["seccomp"] is not None,
        "writable": writable,
        "root": root and uid is None,
        "workdir": config["fence"],
    }


if __name__ == "__main__":
    sys.path.pop(0)  # this script's directory
    main(int(sys.argv[1]))
