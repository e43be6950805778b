"""The plain values of a program's objects: what an instance of a subclass is as one of its base.

They are read without the subclass's own methods, which may say anything.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import collections
import fractions
import keyword
import numbers
import types

# How to read each base, in the order in which they are tried.
BASES = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: lambda value: bytearray(memoryview(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: _as_tuple(value),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    collections.deque: lambda value: collections.deque(
        collections.deque.__iter__(value), collections.deque.maxlen.__get__(value)
    ),
}
CHANGING = (list, dict, set, collections.deque)
# What equals an instance of these.
WRAPPED = {
    collections.UserDict: dict,
    collections.UserList: list,
    collections.UserString: str,
    collections.ChainMap: dict,
    types.MappingProxyType: dict,
}


def plain_value(value):
    """The plain value of an object that is not plain itself; None if it has none."""
    for base, read in BASES.items():
        if isinstance(value, base):
            return read(value)
    if type(value) in WRAPPED:
        return WRAPPED[type(value)](value)
    return _plain_number(value) if isinstance(value, numbers.Number) else None


def is_own_container(value):
    """Whether a value is a list, dict and so on of a class that the program has written."""
    kind = type(value)
    return isinstance(value, CHANGING) and kind.__module__ not in ("builtins", "collections")


def is_named_tuple(kind):
    """Whether a class is what collections.namedtuple makes, not a subclass of one."""
    fields = getattr(kind, "_fields", None)
    return (
        kind.__bases__ == (tuple,)
        and type(fields) is tuple
        and all(type(f) is str and f.isidentifier() and not keyword.iskeyword(f) for f in fields)
        and not any(f.startswith("_") for f in fields)
    )


def _as_tuple(value):
    for kind in type(value).__mro__:
        if is_named_tuple(kind):
            return tuple.__new__(kind, tuple.__iter__(value))
    return tuple(tuple.__iter__(value))


def _plain_number(value):
    """The builtin number that equals one of another library, as sympy's or mpmath's."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Rational):
        return fractions.Fraction(int(value.numerator), int(value.denominator))
    if isinstance(value, numbers.Real):
        return float(value)
    return complex(value) if isinstance(value, numbers.Complex) else None
