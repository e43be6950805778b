"""What a process may ask of the kernel: a system call filter, resource limits, no capabilities.

It uses the standard library only and is valid for Python 3.8, because `sandbox_server.py` also runs
under the interpreters of other environments. Without Linux, only the resource limits work.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

LINUX = sys.platform.startswith("linux")

CLONE_THREAD = 0x00010000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# System calls that programs may not make: numbers by architecture, then common numbers.
SYSCALLS = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "socketpair": 53,
        "tgkill": 234,
        "prlimit64": 302,
        "fcntl": 72,
        "ioctl": 16,
        # sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr
        "sched": (142, 144, 203, 314),
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
            # setpriority, ioprio_set, syslog
            141, 251, 103,
        ],
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "socketpair": 199,
        "tgkill": 131,
        "prlimit64": 261,
        "fcntl": 25,
        "ioctl": 29,
        # sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr
        "sched": (118, 119, 122, 274),
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
            # setpriority, ioprio_set, syslog
            140, 30, 116,
        ],
    },
}  # fmt: skip
# pidfd_send_signal, io_uring_setup, open_tree, move_mount, fsopen, pidfd_open, pidfd_getfd,
# process_madvise, mount_setattr, memfd_secret
REFUSED_EVERYWHERE = (424, 425, 428, 429, 430, 434, 438, 440, 442, 447)
CLONE3 = 435
OWN_PID = 0x7AC0FFEE  # a number that is nothing else in a filter
# Commands of fcntl and ioctl by which the kernel signals another process when a descriptor is ready
# (F_SETOWN, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP), and F_SETLEASE, which makes others wait for a file.
SIGNALLING_FCNTL = (8, 15, 1024)
SIGNALLING_IOCTL = (0x8901, 0x8902)

# The C library, for calls that Python's os module lacks.
LIBC = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """Calls a libc function; raises OSError with its name if it fails."""
    if function(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")


def seccomp_filter():
    """A BPF program (bytes) that refuses the calls in SYSCALLS; None on other architectures.

    OWN_PID in it stands for the number of the process that it is for.

    It allows threads, signals to the process itself (abort), changes of its own limits and
    scheduling, and pairs of stream sockets (asyncio).
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
    # Decided by an argument, at place 16 or 24: the decision if the test holds for one of the
    # operands, and if it does not. A pair of stream sockets is connected for good; other kinds can
    # send to any address.
    for number, place, test, operands, yes, no in (
        (table["clone"], 16, jump_set, [CLONE_THREAD], allow, refuse),
        (table["tgkill"], 16, jump_equal, [OWN_PID], allow, refuse),
        (table["prlimit64"], 16, jump_equal, [0], allow, refuse),
        *((number, 16, jump_equal, [0], allow, refuse) for number in table["sched"]),
        (table["socketpair"], 24, jump_set, [0xE], refuse, allow),
        (table["fcntl"], 24, jump_equal, SIGNALLING_FCNTL, refuse, allow),
        (table["ioctl"], 24, jump_equal, SIGNALLING_IOCTL, refuse, allow),
    ):
        code += [(jump_equal, 0, 2 + 2 * len(operands), number), (load, 0, 0, place)]
        for operand in operands:
            code += [(test, 0, 1, operand), (give, 0, 0, yes)]
        code.append((give, 0, 0, no))
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


def take_uid(uid):
    """Gives up root for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
