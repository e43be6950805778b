"""Values as plain data, to cross between the judge's and the program's process.

A message holds JSON only. None, booleans, small integers, floats and strings stand for themselves;
every other value is `[number]`, a place in a flat table of nodes, so shared, cyclic and deep values
need no recursion. A node is a list: its kind, then what the kind needs. The receiver rebuilds each
value with the exact type that its node's kind names, from the closed list below: whatever the
sender writes, no class, function or code of its own arrives.

The program's side packs an instance of a subclass (of int, str, list, ...) as its plain base value,
and any other object as a handle, a number that only its owner resolves. The judge's side is strict:
it raises `CannotCross`, because a test that passes such an object means that object. (Where a test
runs the program by `exec`, it sends a pickle instead; the judge never reads one.)

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import collections
import datetime
import decimal
import fractions
import itertools
import json
import sys

import sandbox_data as data
import sandbox_errors as errors
import sandbox_plain as plain

SMALL = 1 << 63
# Classes that cross by name. Whatever calling one of them makes, crosses, too: a test that passes
# on what it has made of a program's answer would else be judged in one process.
TYPES = {
    **errors.BUILTIN,
    **{
        kind.__name__: kind
        for kind in (
            bool, bytearray, bytes, complex, dict, enumerate, filter, float, frozenset, int, list,
            map, range, reversed, set, slice, str, tuple, type(None), zip,
        )
    },
}  # fmt: skip
# Modules that a value may name although the receiver has not loaded them.
MODULES = frozenset(getattr(sys, "stdlib_module_names", ())) | {"numpy"}
# Nodes of arrays, which change in place.
ARRAYS = frozenset(["numpy", "objects"])
EMPTY = {
    "list": list,
    "dict": dict,
    "set": set,
    "bytearray": bytearray,
    "counter": collections.Counter,
    "ordered": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
}
MAPPINGS = frozenset(["dict", "counter", "ordered", "defaultdict"])
KINDS = {kind: name for name, kind in EMPTY.items()}
VIEWS = {
    type(getattr(kind(), name)()): name
    for kind in (dict, collections.OrderedDict)
    for name in ("keys", "values", "items")
}
# Classes whose instances cross as their text, by module; the constructor takes it.
TEXTUAL = {
    "ipaddress": ("IPv4Address", "IPv4Network", "IPv6Address", "IPv6Network"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "uuid": ("UUID",),
}


class CannotCross(Exception):
    """A value that has no plain form."""


class Packer:
    """Turns values into nodes.

    Attributes:
        objects: every value that has a number; those that both sides know already come first.
        nodes: the nodes of the values that only this side knows.
    """

    def __init__(self, known, handle, strict, exact=False, handled=()):
        """Starts a message.

        Args:
            known: the numbered values of the message that this one answers; [] for none.
            handle: called with an object that is no plain data; its node, or CannotCross.
            strict: refuses subclasses of plain types instead of packing their plain value.
            exact: leaves out tables and sparse matrices, of which a little is lost.
            handled: the ids of objects that have handles already, and keep them.
        """
        self.objects, self.nodes = list(known), []
        self._numbers = {id(value): number for number, value in enumerate(known)}
        self._handle, self._strict, self._exact = handle, strict, exact
        self._handled = handled
        self._first = len(known)

    def pack(self, value):
        """The packed form of a value; the nodes that it needs are added to `nodes`."""
        packed = self._refer(value)
        while self._first + len(self.nodes) < len(self.objects):
            self.nodes.append(self._node(self.objects[self._first + len(self.nodes)]))
        return packed

    def changes(self, nodes):
        """[number, node] of each container of `nodes` (what arrived) that has changed since."""
        changed = []
        for number, old in enumerate(nodes):
            if old[0] in EMPTY or old[0] in ("deque", *ARRAYS):
                new = self._node(self.objects[number])
                if json.dumps(new) != json.dumps(old):
                    changed.append([number, new])
        self.pack(None)
        return changed

    def _refer(self, value):
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is int and -SMALL < value < SMALL:
            return value
        if kind is str and (value.isascii() or not _has_surrogates(value)):
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return [number]

    def _node(self, value):
        kind = type(value)
        if id(value) in self._handled:
            return self._handle(value)
        if kind in KINDS:
            return self._container(KINDS[kind], value)
        if kind in (tuple, frozenset):
            return [kind.__name__, *map(self._refer, value)]
        if kind is collections.deque:
            return ["deque", value.maxlen, *map(self._refer, value)]
        special = self._special(kind, value) or data.node(value, self._refer, self._exact)
        if special is not None:
            return special
        if plain.is_named_tuple(kind):
            fields = list(kind._fields)
            return ["namedtuple", kind.__name__, fields, *map(self._refer, tuple.__iter__(value))]
        if isinstance(value, BaseException) and (not self._strict or errors.is_known(kind)):
            names, *parts = errors.parts(value)
            return ["error", names, *map(self._refer, parts)]
        base = None if self._strict else plain.plain_value(value)
        return self._handle(value) if base is None else self._node(base)

    def _container(self, name, value):
        if name == "bytearray":
            return [name, value.hex()]
        if name in MAPPINGS:
            factory = [self._refer(value.default_factory)] if name == "defaultdict" else []
            return [name, *factory, *map(self._refer, _chained(dict.items(value)))]
        return [name, *map(self._refer, value)]

    def _special(self, kind, value):
        """The node of an immutable value without parts, or with small ones; None if it is none."""
        if kind is int:
            return ["int", hex(value)]
        if kind is float:
            return ["float", value]
        if kind is str:
            return ["str", value.encode("utf-8", "surrogatepass").hex()]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind in (range, slice):
            return [kind.__name__, *map(self._refer, (value.start, value.stop, value.step))]
        if kind is decimal.Decimal:
            return ["decimal", str(value)]
        if kind is fractions.Fraction:
            return ["fraction", *map(self._refer, (value.numerator, value.denominator))]
        if kind is datetime.timedelta:
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if kind is datetime.date:
            return ["date", value.isoformat()]
        if kind in (datetime.time, datetime.datetime):
            return [kind.__name__, value.isoformat(), value.fold]
        if kind is datetime.timezone:
            return ["timezone", value.utcoffset(None) // datetime.timedelta(microseconds=1)]
        if kind in VIEWS:
            name = VIEWS[kind]
            return [name, *map(self._refer, _chained(value) if name == "items" else value)]
        if kind is type and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        if kind is type(json):
            return ["module", value.__name__]
        module = kind.__module__.partition(".")[0]  # pathlib's is "pathlib._local" in Python 3.13
        if kind.__name__ in TEXTUAL.get(module, ()):
            return ["textual", module, kind.__name__, str(value)]
        return None


class Unpacker:
    """Rebuilds the values of a message."""

    def __init__(self, nodes, known, handle):
        """Rebuilds all nodes.

        Args:
            nodes: the nodes of the message.
            known: the numbered values of the message that this one answers; [] for none.
            handle: called with the node of a handle; the value that stands for it.

        Raises:
            Exception: any kind, if the sender has broken the format.
        """
        self.objects = [*known, *([None] * len(nodes))]
        self._first, self._handle, self._nodes = len(known), handle, nodes
        self._built = [False] * len(nodes)
        for number, node in enumerate(nodes):
            if node[0] in EMPTY:
                self._set(number, EMPTY[node[0]]())
            elif node[0] == "deque":
                self._set(number, collections.deque(maxlen=node[1]))
        # Parts have higher numbers than their owner, unless something else holds them, too.
        for number in reversed(range(len(nodes))):
            if not self._built[number]:
                self._set(number, self._build(nodes[number]))
        for number, node in enumerate(nodes):
            if node[0] in EMPTY or node[0] == "deque":
                self._fill(self.objects[self._first + number], node)

    def value(self, packed):
        """The value of its packed form."""
        if type(packed) is not list:
            return packed
        number = packed[0]
        own = number - self._first
        if own >= 0 and not self._built[own]:
            self._set(own, self._build(self._nodes[own]))
        return self.objects[number]

    def change(self, number, node):
        """Gives a known container the contents of a node."""
        target = self.objects[number]
        if node[0] in ARRAYS:
            data.assign(target, node, self.value)
        else:
            target.clear()
            self._fill(target, node)

    def _set(self, number, value):
        self.objects[self._first + number] = value
        self._built[number] = True

    def _fill(self, target, node):
        kind, parts = node[0], map(self.value, node[1:])
        if kind == "bytearray":
            target += bytes.fromhex(node[1])
        elif kind == "deque":
            next(parts)
            target.extend(parts)
        elif kind in MAPPINGS:
            if kind == "defaultdict":
                target.default_factory = next(parts)
            for key in parts:
                target[key] = next(parts)
        elif kind == "set":
            target.update(parts)
        else:
            target.extend(parts)

    def _build(self, node):
        kind, parts = node[0], node[1:]
        build = BUILDERS.get(kind)
        if build is not None:
            return build(*parts)
        if kind in ("tuple", "frozenset", "range", "slice", "fraction"):
            values = list(map(self.value, parts))
            if kind in ("tuple", "frozenset"):
                return (tuple if kind == "tuple" else frozenset)(values)
            return {"range": range, "slice": slice, "fraction": fractions.Fraction}[kind](*values)
        if kind in ("keys", "values", "items"):
            return self._view(kind, list(map(self.value, parts)))
        if kind == "namedtuple":
            return named_tuple(node[1], tuple(node[2]))(*map(self.value, node[3:]))
        if kind == "error":
            return errors.make(node[1], *map(self.value, node[2:]))
        if kind in data.BUILDERS:
            return data.BUILDERS[kind](self.value, *parts)
        return self._handle(node)

    def _view(self, kind, parts):
        if kind == "items":
            return dict(map(tuple, (parts[i : i + 2] for i in range(0, len(parts), 2)))).items()
        return dict.fromkeys(parts).keys() if kind == "keys" else dict(enumerate(parts)).values()


_chained = itertools.chain.from_iterable


def _has_surrogates(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_named_tuples = {}


def named_tuple(name, fields):
    """The class of a namedtuple with these names, the same one for the same names."""
    key = name, fields
    if key not in _named_tuples:
        _named_tuples[key] = collections.namedtuple(name, fields)
    return _named_tuples[key]


def _textual(module, name, text):
    if name not in TEXTUAL[module]:
        raise ValueError(name)
    return getattr(_import(module), name)(text)


def _import(name):
    if name not in sys.modules and name.partition(".")[0] not in MODULES:
        raise ValueError(name)
    __import__(name)
    return sys.modules[name]


BUILDERS = {
    "int": lambda text: int(text, 16),
    "float": float,
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
    "complex": complex,
    "decimal": decimal.Decimal,
    "timedelta": datetime.timedelta,
    "date": datetime.date.fromisoformat,
    "time": lambda text, fold: datetime.time.fromisoformat(text).replace(fold=fold),
    "datetime": lambda text, fold: datetime.datetime.fromisoformat(text).replace(fold=fold),
    "timezone": lambda offset: datetime.timezone(datetime.timedelta(microseconds=offset)),
    "textual": _textual,
    "type": TYPES.__getitem__,
    "module": _import,
}
