"""pandas' tables, series, indices, times and dtypes as plain data; `sandbox_data.py` says how.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import datetime
import re
import sys
from importlib import import_module as library

PANDAS_DTYPE = re.compile(r"[\w\[\]()<>, :./+-]{1,200}")
ZONE = re.compile(r"[A-Za-z][\w/+-]*")


def pandas_node(value, kind, refer):
    """The node of an object of pandas, whose type is `kind`; None for others."""
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
        return ["pandas dtype", str(value)] if PANDAS_DTYPE.fullmatch(str(value)) else None
    if isinstance(value, pandas.DateOffset):
        freq = _freq(value)
        return freq and ["offset", freq]
    return None


def _freq(offset):
    """A frequency's text; None if it has none that says all."""
    try:
        same = library("pandas.tseries.frequencies").to_offset(offset.freqstr) == offset
    except ValueError:  # "<DateOffset: months=1>"
        return None
    return offset.freqstr if same else None


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
        return library("pytz").FixedOffset(node[1] // 60)
    return datetime.timezone(datetime.timedelta(seconds=node[1]))


def _aware(moment, zone):
    return moment if zone[0] == "none" else moment.tz_localize("UTC").tz_convert(_zone(zone))


def _index_node(value, kind, refer):
    pandas = sys.modules["pandas"]
    if kind is pandas.RangeIndex:
        return ["range index", value.start, value.stop, value.step, refer(value.name)]
    if kind is pandas.MultiIndex:
        parts = [*value.levels, *map(library("numpy").asarray, value.codes), *value.names]
        return ["multi index", *map(refer, parts)]
    dated = kind in (pandas.DatetimeIndex, pandas.TimedeltaIndex) and value.freq is not None
    freq = _freq(value.freq) if dated else None
    return ["index", refer(_values(value)), refer(value.name), freq]


def _extension_node(value, kind, refer):
    pandas = sys.modules["pandas"]
    if kind is pandas.Categorical:
        return ["categorical", refer(value.codes), refer(value.dtype)]
    if kind is pandas.arrays.DatetimeArray:
        moments = pandas.DatetimeIndex(value)
        zone = _zone_node(moments.tz)
        return zone and ["moments", refer(_naive(moments).to_numpy()), zone]
    if isinstance(value.dtype, library("numpy").dtype):
        return ["wrapped", refer(value.to_numpy())]
    dtype = str(value.dtype)
    return ["extension", dtype, *map(refer, value)] if PANDAS_DTYPE.fullmatch(dtype) else None


def _pandas_dtype(value_of, text):
    if not PANDAS_DTYPE.fullmatch(text):
        raise ValueError(text)
    return library("pandas").api.types.pandas_dtype(text)


def _frame(value_of, index, columns, *parts):
    pandas = library("pandas")
    rows = value_of(index)
    series = [_plain_series(value_of(part)) for part in parts]
    frame = pandas.DataFrame(dict(enumerate(series)), index=pandas.RangeIndex(len(rows)))
    frame.index, frame.columns = rows, value_of(columns)
    return frame


def _plain_series(column):
    """A column as a series; the dtype is given, or pandas would look for a better one."""
    return library("pandas").Series(column, dtype=column.dtype)


def _series(value_of, column, index, name):
    series = _plain_series(value_of(column))
    series.index, series.name = value_of(index), value_of(name)
    return series


def _index(value_of, column, name, freq):
    column = value_of(column)
    index = library("pandas").Index(column, dtype=column.dtype, name=value_of(name))
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
    make = library("pandas").MultiIndex  # its own check refuses levels with equal values
    return make(levels, codes, names=names, verify_integrity=False)


def _extension(value_of, dtype, *parts):
    elements = list(map(value_of, parts))
    return library("pandas").array(elements, dtype=_pandas_dtype(value_of, dtype))


BUILDERS = {
    "frame": _frame,
    "series": _series,
    "index": _index,
    "range index": lambda value_of, start, stop, step, name: library("pandas").RangeIndex(
        start, stop, step, name=value_of(name)
    ),
    "multi index": _multi_index,
    "categorical": lambda value_of, codes, dtype: library("pandas").Categorical.from_codes(
        value_of(codes), dtype=value_of(dtype)
    ),
    "categories": lambda value_of, categories, ordered: library("pandas").CategoricalDtype(
        value_of(categories), ordered
    ),
    "moments": lambda value_of, array, zone: (
        _aware(library("pandas").DatetimeIndex(value_of(array)), zone).array
    ),
    "wrapped": lambda value_of, array: library("pandas").array(
        value_of(array), dtype=value_of(array).dtype
    ),
    "extension": _extension,
    "pandas dtype": _pandas_dtype,
    "missing": lambda value_of, name: {"NaT": library("pandas").NaT, "NA": library("pandas").NA}[
        name
    ],
    "timestamp": lambda value_of, moment, zone: _aware(
        library("pandas").Timestamp(value_of(moment)), zone
    ),
    "duration": lambda value_of, span: library("pandas").Timedelta(value_of(span)),
    "period": lambda value_of, ordinal, freq: library("pandas").Period(ordinal=ordinal, freq=freq),
    "interval": lambda value_of, left, right, closed: library("pandas").Interval(
        value_of(left), value_of(right), closed
    ),
    "offset": lambda value_of, text: library("pandas.tseries.frequencies").to_offset(text),
}
