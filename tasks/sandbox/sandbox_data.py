"""Arrays, tables and tensors as plain data: numpy, pandas, scipy.sparse, torch and TensorFlow.

`sandbox_codec.py` asks here for the node of a library's object, and for the object of a node. A
node holds numbers, names and other nodes: the bytes and the dtype of an array, the columns and the
index of a table. The receiver calls the library's own constructor of the kind that the node names,
from the closed list below, and no code, class or pickle of the sender's. Exact types only: an
instance of a subclass that a program has defined is no data.

What is lost: which arrays share memory, in which order they lie in it, and the graph behind a
tensor (whether it requires a gradient is kept).

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import datetime
import importlib
import re
import sys

# Libraries whose objects may arrive, so the receiver may import them.
LIBRARIES = ("numpy", "pandas", "scipy", "torch", "tensorflow")
DTYPE = re.compile(r"[<>|=]?[biufcUSV][0-9]+|[<>|=]?[mM]8(\[[0-9A-Za-z]+\])?")
PANDAS_DTYPE = re.compile(r"[\w\[\], :./+-]{1,200}")
ZONE = re.compile(r"[A-Za-z][\w/+-]*")
SPARSE = re.compile(r"(bsr|coo|csc|csr|dia|dok|lil)_(array|matrix)")


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
    if library not in LIBRARIES or library not in sys.modules:
        return None
    if exact and library in ("pandas", "scipy"):
        return None
    return {
        "numpy": _numpy,
        "pandas": _pandas,
        "scipy": _scipy,
        "torch": _torch,
        "tensorflow": _tensorflow,
    }[library](value, kind, refer)


def assign(target, node, value_of):
    """Gives a known array the contents of a node."""
    target[...] = BUILDERS[node[0]](value_of, *node[1:])


def _library(name):
    return importlib.import_module(name)


# numpy


def _dtype_node(dtype):
    """A dtype's text, or its fields; None if it holds objects or has a layout of its own."""
    if dtype.names is not None:
        fields = [[name, _dtype_node(dtype.fields[name][0])] for name in dtype.names]
        if any(part is None for _, part in fields) or _dtype(fields) != dtype:
            return None
        return fields
    return dtype.str if DTYPE.fullmatch(dtype.str) else None


def _dtype(node):
    numpy = _library("numpy")
    if type(node) is list:
        return numpy.dtype([(name, _dtype(part)) for name, part in node])
    if not DTYPE.fullmatch(node):
        raise ValueError(node)
    return numpy.dtype(node)


def _numpy(value, kind, refer):
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.dtype):
        dtype = "O" if value.kind == "O" else _dtype_node(value)
        return dtype and ["dtype", dtype]
    if kind is numpy.ndarray and value.dtype.kind == "O":
        return ["objects", list(value.shape), *map(refer, value.flat)]
    if kind is numpy.ndarray or isinstance(value, numpy.generic):
        dtype = _dtype_node(value.dtype)
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
    return _library("numpy").dtype(object) if dtype == "O" else _dtype(dtype)


def _array(value_of, dtype, shape, data, is_array):
    numpy = _library("numpy")
    array = numpy.frombuffer(bytes.fromhex(data), _dtype(dtype)).reshape(shape)
    return array.copy() if is_array else array[()]


def _objects(value_of, shape, *parts):
    array = _library("numpy").empty(len(parts), object)
    for number, part in enumerate(parts):
        array[number] = value_of(part)
    return array.reshape(shape)


def _masked(value_of, *parts):
    masked = _library("numpy").ma
    if not parts:
        return masked.masked
    data, mask, fill = parts
    mask = masked.nomask if mask is None else value_of(mask)
    return masked.MaskedArray(value_of(data), mask, fill_value=value_of(fill))


# pandas


def _pandas(value, kind, refer):
    pandas = sys.modules["pandas"]
    if kind is pandas.DataFrame:
        columns = [refer(_values(value.iloc[:, i])) for i in range(value.shape[1])]
        return ["frame", refer(value.index), refer(value.columns), *columns]
    if kind is pandas.Series:
        return ["series", refer(_values(value)), refer(value.index), refer(value.name)]
    if isinstance(value, pandas.Index):
        return _index_node(value, kind, refer)
    if isinstance(value, pandas.api.extensions.ExtensionArray):
        return _extension_node(value, kind, refer)
    if value is pandas.NaT or value is pandas.NA:
        return ["missing", "NaT" if value is pandas.NaT else "NA"]
    if kind is pandas.Timestamp:
        zone = _zone_node(value.tz)
        return zone and ["timestamp", refer(_naive(value).to_datetime64()), zone]
    if kind is pandas.Timedelta:
        return ["duration", refer(value.to_timedelta64())]
    if kind is pandas.Period:
        return ["period", value.ordinal, value.freqstr]
    if kind is pandas.Interval:
        return ["interval", refer(value.left), refer(value.right), value.closed]
    if kind is pandas.CategoricalDtype:
        return ["categories", refer(value.categories), value.ordered]
    if isinstance(value, pandas.api.extensions.ExtensionDtype):
        return ["pandas dtype", str(value)]
    if isinstance(value, pandas.DateOffset):
        same = pandas.tseries.frequencies.to_offset(value.freqstr) == value
        return ["offset", value.freqstr] if same else None
    return None


def _values(column):
    """The array in a series or an index: numpy's where it is one, else pandas'."""
    numpy = sys.modules["numpy"]
    return column.to_numpy() if isinstance(column.dtype, numpy.dtype) else column.array


def _naive(moment):
    """A timestamp or an index of them in UTC, without the time zone."""
    return moment if moment.tz is None else moment.tz_convert("UTC").tz_localize(None)


def _zone_node(zone):
    """A time zone by its name, or its distance from UTC and its library; None for others."""
    if zone is None:
        return ["none"]
    if ZONE.fullmatch(str(zone)):
        return ["name", str(zone)]
    offset = zone.utcoffset(None)
    if offset is None:
        return None
    library = "pytz" if type(zone).__module__.startswith("pytz") else "datetime"
    return [library, int(offset.total_seconds())]


def _zone(node):
    if node[0] == "name":
        if not ZONE.fullmatch(node[1]):
            raise ValueError(node[1])
        return node[1]
    if node[0] == "pytz":
        return _library("pytz").FixedOffset(node[1] // 60)
    return datetime.timezone(datetime.timedelta(seconds=node[1]))


def _aware(moment, zone):
    return moment if zone[0] == "none" else moment.tz_localize("UTC").tz_convert(_zone(zone))


def _index_node(value, kind, refer):
    pandas = sys.modules["pandas"]
    if kind is pandas.RangeIndex:
        return ["range index", value.start, value.stop, value.step, refer(value.name)]
    if kind is pandas.MultiIndex:
        parts = [*value.levels, *map(_library("numpy").asarray, value.codes), *value.names]
        return ["multi index", *map(refer, parts)]
    freq = value.freqstr if kind in (pandas.DatetimeIndex, pandas.TimedeltaIndex) else None
    return ["index", refer(_values(value)), refer(value.name), freq]


def _extension_node(value, kind, refer):
    pandas = sys.modules["pandas"]
    if kind is pandas.Categorical:
        return ["categorical", refer(value.codes), refer(value.dtype)]
    if kind is pandas.arrays.DatetimeArray:
        moments = pandas.DatetimeIndex(value)
        zone = _zone_node(moments.tz)
        return zone and ["moments", refer(_naive(moments).to_numpy()), zone]
    if isinstance(value.dtype, _library("numpy").dtype):
        return ["wrapped", refer(value.to_numpy())]
    return ["extension", str(value.dtype), *map(refer, value)]


def _pandas_dtype(value_of, text):
    if not PANDAS_DTYPE.fullmatch(text):
        raise ValueError(text)
    return _library("pandas").api.types.pandas_dtype(text)


def _frame(value_of, index, columns, *parts):
    pandas = _library("pandas")
    rows = value_of(index)
    series = [_plain_series(value_of(part)) for part in parts]
    frame = pandas.DataFrame(dict(enumerate(series)), index=pandas.RangeIndex(len(rows)))
    frame.index, frame.columns = rows, value_of(columns)
    return frame


def _plain_series(column):
    """A column as a series; the dtype is given, or pandas would look for a better one."""
    return _library("pandas").Series(column, dtype=column.dtype)


def _series(value_of, column, index, name):
    series = _plain_series(value_of(column))
    series.index, series.name = value_of(index), value_of(name)
    return series


def _index(value_of, column, name, freq):
    column = value_of(column)
    index = _library("pandas").Index(column, dtype=column.dtype, name=value_of(name))
    if freq is not None:
        index.freq = freq
    return index


def _multi_index(value_of, *parts):
    parts = list(map(value_of, parts))
    third = len(parts) // 3
    levels, codes, names = parts[:third], parts[third : 2 * third], parts[2 * third :]
    for level, places in zip(levels, codes):  # noqa: B905 - `strict` is Python 3.10's
        if len(places) and not (places.min() >= -1 and places.max() < len(level)):
            raise ValueError("a code out of bounds would read foreign memory")
    make = _library("pandas").MultiIndex  # its own check refuses levels with equal values
    return make(levels, codes, names=names, verify_integrity=False)


def _extension(value_of, dtype, *parts):
    elements = list(map(value_of, parts))
    return _library("pandas").array(elements, dtype=_pandas_dtype(value_of, dtype))


# scipy


def _scipy(value, kind, refer):
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
    sparse = _library("scipy.sparse")
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


# torch


def _torch(value, kind, refer):
    torch = sys.modules["torch"]
    if kind is torch.Size:
        return ["size", *value]
    if kind is torch.dtype:
        return ["torch dtype", str(value).partition(".")[2]]
    if kind not in (torch.Tensor, torch.nn.Parameter):
        return None
    kept = [value.requires_grad, kind is torch.nn.Parameter]
    plain = value.detach().cpu()
    if plain.layout is torch.sparse_coo:
        plain = plain.coalesce()
        return ["sparse tensor", *map(refer, (plain.indices(), plain.values())), list(plain.shape)]
    if plain.layout is not torch.strided or plain.is_quantized:
        return None
    name = str(plain.dtype).partition(".")[2]
    plain = plain.resolve_conj().resolve_neg().contiguous()
    if plain.dtype is torch.bfloat16:
        plain = plain.view(torch.int16)
    return ["tensor", name, *kept, refer(plain.numpy())]


def _torch_dtype(value_of, name):
    torch = _library("torch")
    dtype = getattr(torch, name)
    if type(dtype) is not torch.dtype:
        raise ValueError(name)
    return dtype


def _tensor(value_of, name, requires_grad, is_parameter, array):
    torch, dtype = _library("torch"), _torch_dtype(value_of, name)
    tensor = torch.from_numpy(value_of(array))
    if tensor.dtype is not dtype:
        tensor = tensor.view(dtype)
    if is_parameter:
        return torch.nn.Parameter(tensor, bool(requires_grad))
    return tensor.requires_grad_(bool(requires_grad))


def _sparse_tensor(value_of, indices, values, shape):
    torch = _library("torch")
    return torch.sparse_coo_tensor(
        value_of(indices), value_of(values), shape, check_invariants=True
    ).coalesce()


# TensorFlow


def _tensorflow(value, kind, refer):
    tensorflow = sys.modules["tensorflow"]
    if isinstance(value, tensorflow.DType):
        return ["tf dtype", value.name]
    if isinstance(value, tensorflow.TensorShape):
        return ["tf shape", None if value.rank is None else value.as_list()]
    if kind.__name__ in ("EagerTensor", "ResourceVariable"):
        array = value.numpy()
        if hasattr(array, "dtype") and array.dtype.kind == "V":  # bfloat16, which numpy lacks
            return None
        return ["eager", value.dtype.name, kind.__name__ == "ResourceVariable", refer(array)]
    if kind is tensorflow.RaggedTensor:
        parts = value.flat_values, *value.nested_row_splits
        return ["ragged", *map(refer, parts)]
    if kind is tensorflow.SparseTensor:
        return ["tf sparse", *map(refer, (value.indices, value.values, value.dense_shape))]
    return None


def _eager(value_of, name, is_variable, array):
    tensorflow = _library("tensorflow")
    make = tensorflow.Variable if is_variable else tensorflow.constant
    return make(value_of(array), dtype=tensorflow.dtypes.as_dtype(name))


def _ragged(value_of, flat, *splits):
    make = _library("tensorflow").RaggedTensor.from_nested_row_splits
    return make(value_of(flat), list(map(value_of, splits)), validate=True)


# Kind of node -> what builds its object from `value_of`, which builds a part, and the parts.
BUILDERS = {
    "dtype": _numpy_dtype,
    "numpy": _array,
    "objects": _objects,
    "matrix": lambda value_of, array: _library("numpy").matrix(value_of(array)),
    "recarray": lambda value_of, array: value_of(array).view(_library("numpy").recarray),
    "masked": _masked,
    "frame": _frame,
    "series": _series,
    "index": _index,
    "range index": lambda value_of, start, stop, step, name: _library("pandas").RangeIndex(
        start, stop, step, name=value_of(name)
    ),
    "multi index": _multi_index,
    "categorical": lambda value_of, codes, dtype: _library("pandas").Categorical.from_codes(
        value_of(codes), dtype=value_of(dtype)
    ),
    "categories": lambda value_of, categories, ordered: _library("pandas").CategoricalDtype(
        value_of(categories), ordered
    ),
    "moments": lambda value_of, array, zone: (
        _aware(_library("pandas").DatetimeIndex(value_of(array)), zone).array
    ),
    "wrapped": lambda value_of, array: _library("pandas").array(
        value_of(array), dtype=value_of(array).dtype
    ),
    "extension": _extension,
    "pandas dtype": _pandas_dtype,
    "missing": lambda value_of, name: {"NaT": _library("pandas").NaT, "NA": _library("pandas").NA}[
        name
    ],
    "timestamp": lambda value_of, moment, zone: _aware(
        _library("pandas").Timestamp(value_of(moment)), zone
    ),
    "duration": lambda value_of, span: _library("pandas").Timedelta(value_of(span)),
    "period": lambda value_of, ordinal, freq: _library("pandas").Period(ordinal=ordinal, freq=freq),
    "interval": lambda value_of, left, right, closed: _library("pandas").Interval(
        value_of(left), value_of(right), closed
    ),
    "offset": lambda value_of, text: _library("pandas.tseries.frequencies").to_offset(text),
    "sparse": _sparse,
    "size": lambda value_of, *lengths: _library("torch").Size(lengths),
    "torch dtype": _torch_dtype,
    "tensor": _tensor,
    "sparse tensor": _sparse_tensor,
    "tf dtype": lambda value_of, name: _library("tensorflow").dtypes.as_dtype(name),
    "tf shape": lambda value_of, dims: _library("tensorflow").TensorShape(dims),
    "eager": _eager,
    "ragged": _ragged,
    "tf sparse": lambda value_of, *parts: _library("tensorflow").SparseTensor(
        *map(value_of, parts)
    ),
}
