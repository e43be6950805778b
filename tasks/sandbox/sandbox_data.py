"""Arrays, tables and tensors as plain data: numpy, pandas, scipy.sparse, torch and TensorFlow.

`sandbox_codec.py` asks here for the node of a library's object, and for the object of a node. A
node holds numbers, names and other nodes: the bytes and the dtype of an array, the columns and the
index of a table. The receiver calls the library's own constructor of the kind that the node names,
from the closed lists of `sandbox_arrays.py`, `sandbox_tables.py` and `sandbox_tensors.py`, and no
code, class or pickle of the sender's. Exact types only: an instance of a subclass that a program
has defined is no data.

What is lost: which arrays share memory, in which order they lie in it, and the operations that a
tensor came from, by which torch would compute its gradient (whether it requires one is kept).

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import sys

import sandbox_arrays as arrays
import sandbox_tables as tables
import sandbox_tensors as tensors

PACKERS = {
    "numpy": arrays.numpy_node,
    "pandas": tables.pandas_node,
    "scipy": arrays.scipy_node,
    "tensorflow": tensors.tensorflow_node,
    "torch": tensors.torch_node,
}
# Kind of node -> what builds its object from `value_of`, which builds a part, and the parts.
BUILDERS = {**arrays.BUILDERS, **tables.BUILDERS, **tensors.BUILDERS}
# Nodes of pandas and scipy, of whose objects a little is lost.
TABLES = frozenset([*tables.BUILDERS, "sparse"])


class Masked(Exception):
    """An array with a masked element."""


def is_of_tables(kind):
    """Whether a class is one of pandas or scipy."""
    return kind.__module__.partition(".")[0] in ("pandas", "scipy")


def allow_masked(allowed):
    """Says whether arrays with masked elements may arrive.

    numpy's own comparisons skip masked elements, so a fully masked array passes for any answer. A
    test that knows of masks says so.
    """
    BUILDERS["masked"] = arrays.BUILDERS["masked"] if allowed else _unmasked


def _unmasked(value_of, *parts):
    array = arrays.BUILDERS["masked"](value_of, *parts)
    if sys.modules["numpy"].ma.is_masked(array):
        raise Masked("a masked element, which passes for equal to anything")
    return array


def node(value, refer, exact=False):
    """The node of a library's object; None if it is none, or has no plain form.

    Args:
        value: the object.
        refer: gives the packed form of a part.
        exact: leaves out tables and sparse matrices, of which a little is lost.
    """
    kind = type(value)
    module = kind.__module__
    library = module.partition(".")[0] if type(module) is str else ""
    if library not in PACKERS or library not in sys.modules:
        return None
    if exact and library in ("pandas", "scipy"):
        return None
    return PACKERS[library](value, kind, refer)


def assign(target, node, value_of):
    """Gives a known array the contents of a node."""
    target[...] = BUILDERS[node[0]](value_of, *node[1:])
