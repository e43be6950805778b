"""What programs see of the machine: namespaces, a root directory of their own, or Landlock.

It uses the standard library only and is valid for Python 3.8, because `sandbox_server.py` also runs
under the interpreters of other environments. It needs Linux.
"""

# The server imports as little as possible before it isolates itself, so no pathlib.
# ruff: noqa: PTH100, PTH102, PTH103, PTH106, PTH110, PTH111, PTH112, PTH114, PTH115, PTH116, PTH120, PTH123, PTH211

import contextlib
import ctypes
import errno
import os
import struct
import sys

from sandbox_limits import LIBC, LINUX, PR_SET_NO_NEW_PRIVS, call, take_uid

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
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

# Landlock's calls (the same numbers everywhere) and rights (linux/landlock.h): to execute, write,
# read, list, then to remove and make entries of all kinds; by version, to link across directories,
# truncate, and control devices.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ON_FILES, LOOK, WRITE_FILE = 0x1 | 0x2 | 0x4 | 1 << 14 | 1 << 15, 0x1 | 0x4 | 0x8, 0x2
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}

if LINUX:
    LIBC.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


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
