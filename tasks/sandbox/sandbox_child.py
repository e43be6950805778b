"""What every process of a job does first, and how it reports an exception.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import errno
import fcntl
import os
import signal

import sandbox_limits as limits

OPEN_FILES = 256  # no descriptor of the server is higher
NONCE_BYTES = 16
DETAIL_BYTES = 2000


class Refusal(PermissionError):
    """What the sandbox does not allow; the verdict on such a program is "refused"."""


class RefusedImport(ImportError):
    """A module that the sandbox does not allow."""


def enter_child(config, limit_s, descriptors):
    """Isolates a fork of the server; `descriptors` become 3, 4 and so on, all others close."""
    os.setsid()
    os.dup2(1, 2)  # both are /dev/null: nobody reads what a program prints
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 16) for descriptor in descriptors]
    for number, descriptor in enumerate(high, 3):
        os.dup2(descriptor, number)
    os.closerange(3 + len(high), OPEN_FILES)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    limits.limit(config, limit_s)
    if config["uid"] is not None:
        limits.take_uid(config["uid"])
    os.chdir(config["workdir"])
    if limits.LINUX:
        limits.drop_privileges(config["seccomp"])


def describe(error, refused=False, size=DETAIL_BYTES, padding=b" " * NONCE_BYTES):
    """An exception as bytes. Its text comes from the program, so anything may happen."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = "an exception that cannot be shown"
    # Marked, and longer than a nonce, so that it cannot be taken for one.
    return (b"X" if refused else b"E") + text.encode("utf-8", "replace")[:size] + padding


def chain(error):
    """An exception and those from which it was raised."""
    found = []
    while error is not None and len(found) < 50:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def is_refusal(
    error,
    chain=chain,
    kinds=(Refusal, RefusedImport),
    numbers=(errno.EPERM, errno.EACCES, errno.EROFS),
):
    """Whether an exception comes from what the sandbox does not allow, as far as it shows."""
    try:
        return any(
            isinstance(part, kinds) or (isinstance(part, OSError) and part.errno in numbers)
            for part in chain(error)
        )
    except BaseException:
        return False  # an exception of the program's own class
