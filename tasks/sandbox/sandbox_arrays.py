"""numpy's arrays and scipy's sparse matrices as plain data; `sandbox_data.py` says how.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import re
import sys
from importlib import import_module as library

DTYPE = re.compile(r"[<>|=]?[biufcUSV][0-9]+|[<>|=]?[mM]8(\[[0-9A-Za-z]+\])?")
SPARSE = re.compile(r"(bsr|coo|csc|csr|dia|dok|lil)_(array|matrix)")


def dtype_node(dtype):
    """A dtype's text, or its fields; None if it holds objects or has a layout of its own."""
    if dtype.names is not None:
        fields = [[name, dtype_node(dtype.fields[name][0])] for name in dtype.names]
        if any(part is None for _, part in fields) or _dtype(fields) != dtype:
            return None
        return fields
    return dtype.str if DTYPE.fullmatch(dtype.str) else None


def _dtype(node):
    numpy = library("numpy")
    if type(node) is list:
        return numpy.dtype([(name, _dtype(part)) for name, part in node])
    if not DTYPE.fullmatch(node):
        raise ValueError(node)
    return numpy.dtype(node)


def numpy_node(value, kind, refer):
    """The node of an object of numpy, whose type is `kind`; None for others."""
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.dtype):
        dtype = "O" if value.kind == "O" else dtype_node(value)
        return dtype and ["dtype", dtype]
    if kind is numpy.ndarray and value.dtype.kind == "O":
        return ["objects", list(value.shape), *map(refer, value.flat)]
    if kind is numpy.ndarray or isinstance(value, numpy.generic):
        dtype = dtype_node(value.dtype)
        is_array = kind is numpy.ndarray
        return dtype and ["numpy", dtype, list(value.shape), value.tobytes().hex(), is_array]
    if kind is numpy.matrix:
        return ["matrix", refer(numpy.asarray(value))]
    if kind is numpy.recarray:
        return ["recarray", refer(numpy.array(value, dtype=value.dtype.descr))]
    if value is numpy.ma.masked:
        return ["masked"]
    if kind is numpy.ma.MaskedArray:
        mask = numpy.ma.getmask(value)
        mask = None if mask is numpy.ma.nomask else refer(mask)
        return ["masked", refer(numpy.ma.getdata(value)), mask, refer(value.fill_value)]
    return None


def _numpy_dtype(value_of, dtype):
    return library("numpy").dtype(object) if dtype == "O" else _dtype(dtype)


def _array(value_of, dtype, shape, data, is_array):
    numpy = library("numpy")
    array = numpy.frombuffer(bytes.fromhex(data), _dtype(dtype)).reshape(shape)
    return array.copy() if is_array else array[()]


def _objects(value_of, shape, *parts):
    array = library("numpy").empty(len(parts), object)
    for number, part in enumerate(parts):
        array[number] = value_of(part)
    return array.reshape(shape)


def _masked(value_of, *parts):
    masked = library("numpy").ma
    if not parts:
        return masked.masked
    data, mask, fill = parts
    mask = masked.nomask if mask is None else value_of(mask)
    return masked.MaskedArray(value_of(data), mask, fill_value=value_of(fill))


def scipy_node(value, kind, refer):
    """The node of a sparse matrix of scipy, whose type is `kind`; None for others."""
    sparse = sys.modules.get("scipy.sparse")
    name = kind.__name__
    if sparse is None or not SPARSE.fullmatch(name) or getattr(sparse, name, None) is not kind:
        return None
    if value.ndim != 2:
        return None
    if name[:3] in ("csr", "csc"):
        parts = value.data, value.indices, value.indptr
    else:
        entries = value.tocoo()
        parts = entries.data, entries.row, entries.col
    return ["sparse", name, [int(n) for n in value.shape], *map(refer, parts)]


def _sparse(value_of, name, shape, data, first, second):
    sparse = library("scipy.sparse")
    if not SPARSE.fullmatch(name):
        raise ValueError(name)
    kind, shape = getattr(sparse, name), tuple(shape)
    data, first, second = value_of(data), value_of(first), value_of(second)
    if name[:3] in ("csr", "csc"):
        matrix = kind((data, first, second), shape=shape)
        matrix.check_format(full_check=True)  # an index out of bounds would read foreign memory
        return matrix
    entries = sparse.coo_matrix((data, (first, second)), shape=shape)
    return kind(entries)


BUILDERS = {
    "dtype": _numpy_dtype,
    "numpy": _array,
    "objects": _objects,
    "matrix": lambda value_of, array: library("numpy").matrix(value_of(array)),
    "recarray": lambda value_of, array: value_of(array).view(library("numpy").recarray),
    "masked": _masked,
    "sparse": _sparse,
}
