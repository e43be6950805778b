"""Isolation by the kernel: namespaces, read-only mounts, limits, a system call filter.

It uses the standard library only and is valid for Python 3.8, because `sandbox_server.py` also runs
under the interpreters of other environments. Without Linux, only the resource limits work.
"""

# The server imports as little as possible before it isolates itself, so no pathlib.
# ruff: noqa: PTH100, PTH102, PTH103, PTH106, PTH110, PTH111, PTH112, PTH114, PTH115, PTH116, PTH120, PTH123, PTH211

import contextlib
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

# What programs see of the machine, beside the interpreter; none of it is secret.
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"
)  # fmt: skip
ETC = (
    "alternatives", "fonts", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias",
    "localtime", "mime.types", "nsswitch.conf", "os-release", "passwd", "protocols", "services",
    "ssl/openssl.cnf", "timezone",
)  # fmt: skip
DEVICES = ("full", "null", "random", "urandom", "zero")
WORKDIR = "/sandbox"  # a program's own folder, in a root directory of ours
FIRST_UID = 1 << 30  # user ids from here on belong to nobody

# System calls that programs may not make: numbers by architecture, then common numbers.
SYSCALLS = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "socketpair": 53,
        "tgkill": 234,
        "prlimit64": 302,
        "refused": [
            # socket, connect, accept, bind, listen, accept4
            41, 42, 43, 49, 50, 288,
            # fork, vfork, execve, execveat, kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
            57, 58, 59, 322, 62, 200, 129, 297,
            # shmget, shmat, shmctl, semget, semop, semctl, shmdt, msgget, msgsnd, msgrcv, msgctl,
            # semtimedop, mq_open, memfd_create
            29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, 220, 240, 319,
            # mknod, mknodat, pivot_root, chroot, mount, umount2, unshare, setns, open_by_handle_at
            133, 259, 155, 161, 165, 166, 272, 308, 304,
            # ptrace, process_vm_readv, process_vm_writev, kcmp, perf_event_open, bpf, userfaultfd
            101, 310, 311, 312, 298, 321, 323,
            # init_module, finit_module, kexec_load, add_key, request_key, keyctl
            175, 313, 246, 248, 249, 250,
        ],
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "socketpair": 199,
        "tgkill": 131,
        "prlimit64": 261,
        "refused": [
            # socket, bind, listen, accept, connect, accept4
            198, 200, 201, 202, 203, 242,
            # execve, execveat, kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
            221, 281, 129, 130, 138, 240,
            # mq_open, msgget to shmdt, memfd_create
            180, *range(186, 198), 279,
            # mknodat, pivot_root, chroot, mount, umount2, unshare, setns, open_by_handle_at
            33, 41, 51, 40, 39, 97, 268, 265,
            # ptrace, process_vm_readv, process_vm_writev, kcmp, perf_event_open, bpf, userfaultfd
            117, 270, 271, 272, 241, 280, 282,
            # init_module, finit_module, kexec_load, add_key, request_key, keyctl
            105, 273, 104, 217, 218, 219,
        ],
    },
}  # fmt: skip
# pidfd_send_signal, io_uring_setup, open_tree, move_mount, fsopen, pidfd_open, pidfd_getfd,
# process_madvise, mount_setattr, memfd_secret
REFUSED_EVERYWHERE = (424, 425, 428, 429, 430, 434, 438, 440, 442, 447)
CLONE3 = 435
OWN_PID = 0x7AC0FFEE  # a number that is nothing else in a filter

# Landlock's calls (the same numbers everywhere) and rights (linux/landlock.h): to execute, write,
# read, list, then to remove and make entries of all kinds; by version, to link across directories,
# truncate, and control devices.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ON_FILES, LOOK, WRITE_FILE = 0x1 | 0x2 | 0x4 | 1 << 14 | 1 << 15, 0x1 | 0x4 | 0x8, 0x2
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


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

    Root needs no user namespace, if programs can run under a user id of their own.

    Returns: the user id that programs must take; None if they keep this process's.

    Raises:
        OSError: the kernel refuses.
    """
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    fresh = unused_uid(interpreter_paths())
    if fresh is not None:
        try:
            call(LIBC.unshare, spaces)
        except OSError:
            pass  # root of a container, perhaps
        else:
            mount("none", "/", None, MS_REC | MS_PRIVATE)
            return fresh
    call(LIBC.unshare, CLONE_NEWUSER | spaces)
    write_file("/proc/self/setgroups", "deny")
    # Inside, be an ordinary user without capabilities, who owns the files of the user outside.
    write_file("/proc/self/uid_map", f"1000 {uid} 1")
    write_file("/proc/self/gid_map", f"1000 {gid} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    return None


def unused_uid(paths):
    """A user id that nobody has, for the programs of a server that is root; else None.

    It must be able to read `paths` and the packages: they may be root's alone.
    """
    needed = [*paths, os.__file__, *(p for p in sys.path if p.startswith(sys.prefix))]
    if os.geteuid() != 0 or not all(readable(path) for path in needed if os.path.exists(path)):
        return None
    uid = FIRST_UID + os.getpid()
    pid = os.fork()
    if pid == 0:  # root of a container may lack the capability, or such ids
        try:
            take_uid(uid)
            os._exit(0)
        except OSError:
            os._exit(1)
    return uid if os.waitpid(pid, 0)[1] == 0 else None


def take_uid(uid):
    """Gives up root for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def readable(path):
    """Whether everybody may read a file, or enter and list a folder."""
    wanted = 0o5 if os.path.isdir(path) else 0o4
    return os.stat(path).st_mode & wanted == wanted


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
            if os.fork() == 0:  # only a child is in the new PID namespace
                enter_root()
        except OSError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        reason = file.read()
    os.waitpid(pid, 0)
    return reason


def interpreter_paths():
    """The folders of this interpreter and its packages."""
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix]
    return sorted({part for path in paths for part in (path, os.path.realpath(path))} - {"/"})


def parents(path):
    """A path and the folders on the way to it."""
    return [path] if os.path.dirname(path) == path else [path, *parents(os.path.dirname(path))]


def visible_paths():
    """What programs see of the machine: the system's programs, the interpreter, libraries."""
    home = os.path.expanduser("~/")
    libraries = [
        path
        for path in os.environ.get("LD_LIBRARY_PATH", "").split(":")
        if path and not home.startswith(f"{os.path.abspath(path)}/".replace("//", "/"))
    ]
    paths = [*SYSTEM, *(f"/etc/{name}" for name in ETC), *interpreter_paths(), *libraries]
    found = []
    for path in sorted({os.path.abspath(path) for path in paths if os.path.exists(path)}):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def enter_root():
    """Changes to a root directory of its own, in memory, with nothing but `visible_paths`.

    So programs find no home directory, no sockets or FIFOs of other processes, no devices but
    five harmless ones, and no files of the user's.

    Returns: the mounts in it: point and options.

    Raises:
        OSError: the kernel refuses.
    """
    paths = visible_paths()
    # Any directory can be the place to build in, but for those that hide what is to be seen.
    stage = next(
        place
        for place in ("/sys", "/mnt", "/srv", "/var/tmp", "/tmp")
        if os.path.isdir(place) and not any(f"{path}/".startswith(f"{place}/") for path in paths)
    )
    mount("sandbox", stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in paths:
        if os.path.islink(path) and os.path.dirname(path) == "/":
            os.symlink(os.readlink(path), stage + path)
        else:
            bind(path, stage + path)
    for name in DEVICES:
        bind(f"/dev/{name}", f"{stage}/dev/{name}")
    # An empty, read-only /dev/shm makes named semaphores (multiprocessing) a refusal, not an error.
    for name in ("dev/shm", "proc", "tmp", WORKDIR.lstrip("/"), "old"):
        os.makedirs(f"{stage}/{name}", exist_ok=True)
    with contextlib.suppress(OSError):  # some containers; then waiting times are unknown
        mount("proc", f"{stage}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    call(LIBC.pivot_root, os.fsencode(stage), os.fsencode(f"{stage}/old"))
    os.chdir("/")
    with open("/old/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split(" ")[4:6] for line in file]
    call(LIBC.umount2, b"/old", MNT_DETACH)
    os.rmdir("/old")
    return [mount for mount in mounts if mount[0] != "/old" and not mount[0].startswith("/old/")]


def bind(source, target):
    """Shows a file or a directory at a second place."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, None, MS_BIND | MS_REC)


def landlock(workdir):
    """Lets this process write below `workdir` only, and see `visible_paths` only; for good.

    It needs neither root nor namespaces, and holds for native code, too.

    Returns: whether the kernel has it.
    """
    version = LIBC.syscall(CREATE_RULESET, None, 0, 1) if LINUX else -1
    if version < 3:
        return False  # older ones cannot refuse to truncate files
    rights = RIGHTS[5 if version >= 5 else 3]
    # Files; nothing of the network, which the system call filter refuses; later versions also keep
    # signals and abstract sockets (3) from leaving.
    size = 24 if version >= 6 else 8
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", rights, 0, 3), 24)
    ruleset = LIBC.syscall(CREATE_RULESET, attributes, size, 0)
    if ruleset == -1:
        return False
    allowed = dict.fromkeys(visible_paths(), LOOK)
    allowed.update((f"/dev/{name}", LOOK | WRITE_FILE) for name in DEVICES)
    allowed[workdir] = rights
    for path, access in allowed.items():
        descriptor = os.open(path, os.O_PATH)
        access &= rights if os.path.isdir(path) else ON_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, descriptor), 12)
        call(LIBC.syscall, ADD_RULE, ruleset, 1, rule, 0)
        os.close(descriptor)
    call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(LIBC.syscall, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return True


def write_file(path, text):
    """Writes a short file in one call, as /proc requires."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def lock_file_system(mounts):
    """Makes each of `mounts` read-only and without devices (but for ours), and hides /proc.

    The interpreter's path stays in it, as /proc/self/exe and /proc/self/cmdline, and an empty
    /proc/self/maps.

    Returns: the mount points that are still writable.
    """
    writable = []
    for point, options in mounts:
        path = point.replace("\\040", " ")
        flags = sum(MOUNT_FLAGS.get(option, 0) for option in options.split(","))
        if not path.startswith("/dev/"):
            flags |= MS_NODEV | MS_NOSUID
        try:
            mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
        except OSError as error:
            # These errors mean a mount point under another mount: programs cannot reach it either.
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR) or path == "/":
                writable.append(path)
    flags = MS_NOSUID | MS_NODEV
    mount("hidden", "/proc", "tmpfs", flags, "size=8k")
    os.mkdir("/proc/self")  # TensorFlow aborts if it cannot read these two
    os.symlink(os.path.realpath(sys.executable), "/proc/self/exe")
    with open("/proc/self/cmdline", "w", encoding="utf-8") as file:
        file.write(f"{sys.executable}\0program.py\0")
    # threadpoolctl (KMeans of scikit-learn) looks for libraries in this one.
    os.close(os.open("/proc/self/maps", os.O_CREAT | os.O_WRONLY))
    mount(None, "/proc", None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    return writable


def seccomp_filter():
    """A BPF program (bytes) that refuses the calls in SYSCALLS; None on other architectures.

    OWN_PID in it stands for the number of the process that it is for.

    It allows threads, signals to the process itself (abort), changes of its own limits, and pairs
    of stream sockets (asyncio).
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
    # Decided by an argument, at place 16 or 24: the decision if the test holds, and if it does not.
    # A pair of stream sockets is connected for good; other kinds can send to any address.
    for name, place, test, operand, yes, no in (
        ("clone", 16, jump_set, CLONE_THREAD, allow, refuse),
        ("tgkill", 16, jump_equal, OWN_PID, allow, refuse),
        ("prlimit64", 16, jump_equal, 0, allow, refuse),
        ("socketpair", 24, jump_set, 0xE, refuse, allow),
    ):
        code += [
            (jump_equal, 0, 4, table[name]),
            (load, 0, 0, place),
            (test, 0, 1, operand),
            (give, 0, 0, yes),
            (give, 0, 0, no),
        ]
    code.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def refuse_system_calls(program):
    """Installs a seccomp filter in this process; it cannot be removed."""
    program = program.replace(struct.pack("=I", OWN_PID), struct.pack("=I", os.getpid()))
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(head)
    call(LIBC.prctl, PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0)


def working_filter():
    """The seccomp filter; None if the kernel does not accept it, as a child process finds out."""
    program = seccomp_filter() if LINUX else None
    if program is None:
        return None
    pid = os.fork()
    if pid == 0:
        try:
            call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            refuse_system_calls(program)
            os._exit(0)
        except OSError:
            os._exit(1)
    return program if os.waitpid(pid, 0)[1] == 0 else None


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


def drop_privileges(program):
    """Drops all capabilities and the right to gain any; then installs the filter, if any."""
    call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    call(LIBC.capset, header, ctypes.create_string_buffer(24))
    if program is not None:
        refuse_system_calls(program)
