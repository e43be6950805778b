"""Calls between the judge's process and the program's: a frame of plain data each way.

The judge asks (call this function, read this attribute, take the next item), the program's process
answers with a value or an exception. While it works on an answer, it may call back the functions
that the test has passed to it. After a call, the judge's own lists, dicts and sets get the contents
that the program has given to its copies of them.
"""

import _thread
import abc
import errno
import json
import os
import struct

import sandbox_codec as codec

FRAME_BYTES = 64 << 20
# Operations on two objects; REFLECTED ones are the right operand's.
BINARY = (
    "add", "and", "eq", "floordiv", "ge", "gt", "le", "lshift", "lt", "matmul", "mod", "mul", "ne",
    "or", "pow", "rshift", "sub", "truediv", "xor",
)  # fmt: skip
REFLECTED = tuple(f"r{name}" for name in BINARY if name not in ("eq", "ge", "gt", "le", "lt", "ne"))
OPERATIONS = (*BINARY, *REFLECTED, "contains")


class TooLong(PermissionError):
    """A message of ours is longer than the other side takes."""


class Broken(Exception):
    """The other side sends what is not in the format."""


class Ended(Broken):
    """The other side has closed the connection."""


def read_frame(descriptor, most=FRAME_BYTES):
    """Reads eight bytes of length, then as many of JSON.

    Raises:
        Ended: the other side has closed the connection.
        Broken: the frame is malformed or longer than `most`.
    """
    size = struct.unpack("!Q", _read(descriptor, 8))[0]
    if size > most:
        raise Broken("a message is too long")
    try:
        return json.loads(_read(descriptor, size))
    except (ValueError, RecursionError) as error:
        raise Broken("a message is malformed") from error


def _read(descriptor, size):
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise Ended("the other side has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_frame(descriptor, message):
    """Writes what `read_frame` reads.

    Raises:
        TooLong: the message is longer than FRAME_BYTES; nothing has been written.
        OSError: the other side has ended.
    """
    body = json.dumps(message).encode()
    if len(body) > FRAME_BYTES:
        raise TooLong(errno.EPERM, f"a call takes and returns at most {FRAME_BYTES >> 20} MB")
    data = memoryview(struct.pack("!Q", len(body)) + body)
    while data:
        data = data[os.write(descriptor, data) :]


_operations = {}


def operations(kind):
    """The names in OPERATIONS that a class defines."""
    if kind not in _operations:
        methods = ((name, f"__{name}__") for name in OPERATIONS)
        _operations[kind] = [
            name
            for name, method in methods
            if getattr(kind, method, None) is not getattr(object, method, None)
        ]
    return _operations[kind]


class Link(abc.ABC):
    """One end of the connection; `sandbox_judge.py` and `sandbox_program.py` have one each.

    The objects that have gone out as handles are kept, under the numbers that the other end uses.
    An end says what it packs (`_strict`, `_handle`), which operations it does for the other one
    (`_try`), and what stands for an object of the other's (`_make`).
    """

    _strict = _exact = False

    def __init__(self, descriptor):
        """Takes an open stream socket."""
        self._descriptor = descriptor
        self._lock = _thread.RLock()
        self._mine, self._numbers, self._theirs = [], {}, {}

    def ask(self, operation, target, *args, **kwargs):
        """Lets the other end do an operation; returns its value or raises its exception."""
        try:
            what, value = self._exchange((operation, target, args, kwargs))
        except Exception as error:
            self._lost(error)
            raise
        if what == "value":
            return value
        raise value

    def _exchange(self, request):
        with self._lock:
            packer = codec.Packer([], self._handle, self._strict, self._exact, self._numbers)
            packed = packer.pack(request)
            write_frame(self._descriptor, ["ask", packer.nodes, packed, []])
            while True:
                what, nodes, packed, changed = read_frame(self._descriptor)
                if what != "ask":
                    break
                self.answer(nodes, packed)
        unpacker = self._unpack(nodes, packer.objects)
        for number, node in changed:
            unpacker.change(number, node)
        value = unpacker.value(packed)
        if what != "value" and not isinstance(value, BaseException):
            raise Broken("an exception that is none")
        return what, value

    def answer(self, nodes, packed):
        """Does what the other end asks for and sends the outcome."""
        unpacker = self._unpack(nodes, [])
        operation, target, args, kwargs = unpacker.value(packed)
        what, result = self._try(operation, target, args, kwargs)
        packer = self._answering(unpacker)
        try:
            packed = packer.pack(result)
            changed = packer.changes(nodes)
        except Exception as error:  # an object of the program's that breaks when looked at
            packer = self._answering(unpacker)
            what, packed, changed = "error", packer.pack(Exception(type(error).__name__)), []
        try:
            write_frame(self._descriptor, [what, packer.nodes, packed, changed])
        except TooLong as error:
            packer = self._answering(unpacker)
            packed = packer.pack(error)
            write_frame(self._descriptor, ["refused", packer.nodes, packed, []])

    def _answering(self, unpacker):
        return codec.Packer(unpacker.objects, self._any_handle, False, False, self._numbers)

    def _unpack(self, nodes, known):
        return codec.Unpacker(nodes, known, self._stand_in)

    def _any_handle(self, value):
        """The node of a handle for any object of this end."""
        known = self._known(value)
        if known is not None:
            return known
        self._numbers[id(value)] = len(self._mine)
        self._mine.append(value)
        return self._known(value)

    def _known(self, value):
        """The node of an object that has a number already; None if it has none."""
        number = self._numbers.get(id(value))
        if number is None or number < 0:
            return None if number is None else ["yours", -1 - number]
        kind = "iterator" if hasattr(type(value), "__next__") else "object"
        kind = "function" if callable(value) else kind
        return ["mine", number, kind, operations(type(value))]

    def _stand_in(self, node):
        whose, number = node[:2]
        if whose == "yours":
            return self._mine[number]
        if whose != "mine":
            raise Broken("a value of no kind")
        if number not in self._theirs:
            value = self._theirs[number] = self._make(number, node[2], node[3])
            self._numbers[id(value)] = -1 - number
        return self._theirs[number]

    def _handle(self, value):
        return self._any_handle(value)

    @abc.abstractmethod
    def _lost(self, error):
        """Called when a request has failed for a reason that is no answer of the other end."""

    @abc.abstractmethod
    def _try(self, operation, target, args, kwargs) -> "tuple[str, object]":
        """Does an operation for the other end: "value" and its result, or "error" and why."""

    @abc.abstractmethod
    def _make(self, number, kind, operations) -> object:
        """What stands for object `number` of the other end."""
