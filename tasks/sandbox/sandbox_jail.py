"""Isolation by the kernel: namespaces, read-only mounts, limits, a system call filter.

It uses the standard library only and is valid for Python 3.8, because `sandbox_server.py` also runs
under the interpreters of other environments. Without Linux, only the resource limits work.
"""

# The server imports as little as possible before it isolates itself, so no pathlib.
# ruff: noqa: PTH112, PTH123

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

LINUX = sys.platform.startswith("linux")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x00010000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
MOUNT_FLAGS = {
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# System calls that programs may not make: numbers by architecture, then common numbers.
SYSCALLS = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "tgkill": 234,
        "prlimit64": 302,
        # socket, fork, vfork, execve, kill, ptrace, rt_sigqueueinfo, pivot_root, chroot, mount,
        # umount2, init_module, tkill, kexec_load, add_key, request_key, keyctl, unshare,
        # rt_tgsigqueueinfo, perf_event_open, setns, process_vm_readv, process_vm_writev, kcmp,
        # finit_module, bpf, execveat, userfaultfd
        "refused": [
            41,
            57,
            58,
            59,
            62,
            101,
            129,
            155,
            161,
            165,
            166,
            175,
            200,
            246,
            248,
            249,
            250,
            272,
            297,
            298,
            308,
            310,
            311,
            312,
            313,
            321,
            322,
            323,
        ],
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "tgkill": 131,
        "prlimit64": 261,
        # umount2, mount, pivot_root, chroot, unshare, kexec_load, init_module, ptrace, kill, tkill,
        # rt_sigqueueinfo, socket, add_key, request_key, keyctl, execve, rt_tgsigqueueinfo,
        # perf_event_open, setns, process_vm_readv, process_vm_writev, kcmp, finit_module, bpf,
        # execveat, userfaultfd
        "refused": [
            39,
            40,
            41,
            51,
            97,
            104,
            105,
            117,
            129,
            130,
            138,
            198,
            217,
            218,
            219,
            221,
            240,
            241,
            268,
            270,
            271,
            272,
            273,
            280,
            281,
            282,
        ],
    },
}
# pidfd_send_signal, io_uring_setup, open_tree, move_mount, fsopen, pidfd_open, pidfd_getfd,
# process_madvise, mount_setattr
REFUSED_EVERYWHERE = (424, 425, 428, 429, 430, 434, 438, 440, 442)
CLONE3 = 435


# The C library, for calls that Python's os module lacks.
LIBC = ctypes.CDLL(None, use_errno=True)
if LINUX:
    LIBC.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


def call(function, *args):
    """Calls a libc function; raises OSError with its name if it fails."""
    if function(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")


def mount(source, target, kind, flags, options=None):
    """mount(2)."""
    encode = [
        None if text is None else os.fsencode(text) for text in (source, target, kind, options)
    ]
    call(LIBC.mount, encode[0], encode[1], encode[2], flags, encode[3])


def enter_namespaces():
    """Moves this process into new namespaces (into the new PID namespace, only its children).

    Raises:
        OSError: the kernel refuses.
    """
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    try:
        call(LIBC.unshare, CLONE_NEWUSER | spaces)
    except OSError:
        if uid != 0:
            raise
        call(LIBC.unshare, spaces)  # root needs no user namespace
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        return
    write_file("/proc/self/setgroups", "deny")
    # Inside, be an ordinary user without capabilities, who owns the files of the user outside.
    write_file("/proc/self/uid_map", f"1000 {uid} 1")
    write_file("/proc/self/gid_map", f"1000 {gid} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def why_no_namespaces():
    """Tries namespaces in a child process, because a partial success cannot be undone.

    Returns: "" if they work, else the kernel's reason.
    """
    if not LINUX:
        return f"{sys.platform} has none"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            enter_namespaces()
            mount("sandbox", "/proc", "tmpfs", MS_RDONLY)
        except OSError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        reason = file.read()
    os.waitpid(pid, 0)
    return reason


def write_file(path, text):
    """Writes a short file in one call, as /proc requires."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def lock_file_system(hidden):
    """Makes every mount of this mount namespace read-only, and hides the directories `hidden`.

    Returns: the mount points that are still writable.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split(" ")[4:6] for line in file]
    writable = []
    for point, options in mounts:
        path = point.replace("\\040", " ")
        flags = sum(MOUNT_FLAGS.get(option, 0) for option in options.split(","))
        try:
            mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
        except OSError as error:
            # These errors mean a mount point under another mount: programs cannot reach it either.
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR) or path == "/":
                writable.append(path)
    for directory in hidden:
        mount("hidden", directory, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    return writable


def home_to_hide(home, keep):
    """The user's home directory in a list; [] if it holds the interpreter or a path to keep."""
    home = os.path.realpath(home)
    used = [*sys.path, sys.prefix, sys.base_prefix, sys.executable, *keep]
    inside = [path for path in used if os.path.realpath(path).startswith(home + os.sep)]
    return [] if inside or home == os.sep or not os.path.isdir(home) else [home]


def seccomp_filter(pid):
    """A BPF program (bytes) that refuses the calls in SYSCALLS; None on other architectures.

    It allows threads, signals to the process itself (abort), and changes of its own limits.
    """
    table = SYSCALLS.get(platform.machine())
    if table is None or struct.calcsize("P") != 8 or sys.byteorder != "little":
        return None
    load, jump_equal, jump_set, jump_more, give = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    absent = 0x00050000 | errno.ENOSYS  # "no such call": the C library then uses clone
    code = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, table["audit"]),
        (give, 0, 0, refuse),
        (load, 0, 0, 0),
        (jump_more, 0, 1, 0x40000000),  # the x32 calls
        (give, 0, 0, refuse),
        (jump_equal, 0, 1, CLONE3),
        (give, 0, 0, absent),
    ]
    for number in (*table["refused"], *REFUSED_EVERYWHERE):
        code += [(jump_equal, 0, 1, number), (give, 0, 0, refuse)]
    # Allowed for one value of the first argument: (number, test, operand).
    for number, test, operand in (
        (table["clone"], jump_set, CLONE_THREAD),
        (table["tgkill"], jump_equal, pid),
        (table["prlimit64"], jump_equal, 0),
    ):
        code += [
            (jump_equal, 0, 4, number),
            (load, 0, 0, 16),
            (test, 0, 1, operand),
            (give, 0, 0, allow),
            (give, 0, 0, refuse),
        ]
    code.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def refuse_system_calls():
    """Installs the seccomp filter in this process; it cannot be removed."""
    program = seccomp_filter(os.getpid())
    if program is None:
        return
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(head)
    call(LIBC.prctl, PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0)


def seccomp_works():
    """Whether the kernel accepts the filter; a child process tries it."""
    if not LINUX or seccomp_filter(1) is None:
        return False
    pid = os.fork()
    if pid == 0:
        try:
            call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            refuse_system_calls()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def limit(config, seconds):
    """Sets this process's resource limits. CPU time is limited in case the server's clock fails."""
    wanted = {
        "RLIMIT_AS": config["memory_bytes"],
        "RLIMIT_CPU": int(seconds * 2) + 1,
        "RLIMIT_FSIZE": config["file_bytes"],
        "RLIMIT_NOFILE": config["open_files"],
        "RLIMIT_NPROC": config["threads"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None or (name == "RLIMIT_NPROC" and not config["own_user"]):
            continue  # without a user namespace, the user's other processes would count
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if LINUX:
                raise  # macOS has RLIMIT_AS but refuses to set it


def drop_privileges(use_seccomp):
    """Drops all capabilities and the right to gain any; then forbids many system calls."""
    call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    call(LIBC.capset, header, ctypes.create_string_buffer(24))
    if use_seccomp:
        refuse_system_calls()
