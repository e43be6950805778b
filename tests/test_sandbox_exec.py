"""Tests that run the program themselves, by `exec` (DS-1000): the program runs in its own process.

The wrong programs of `CHEATS` passed, nearly all, while test and program shared a process.
"""

import sys

import pytest

from tasks.sandbox import Program, Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

LIBRARIES = ("numpy.testing", "pandas.testing")
CONTEXT = '''
import copy
import numpy as np
import pandas as pd


def generate_test_case(test_case_id):
    test_input = {input}
    return test_input, {answer}


def exec_test(result, ans):
    {check}
    return 1


exec_context = r"""
import numpy as np
import pandas as pd
x = test_input
[insert]
"""


def test_execution(solution):
    code = exec_context.replace("[insert]", solution)
    for i in range(2):
        test_input, expected_result = generate_test_case(i + 1)
        test_env = {{"test_input": test_input}}
        exec(code, test_env)
        assert exec_test(test_env["result"], expected_result)
'''
ARRAY = CONTEXT.format(
    input="np.arange(3) + test_case_id",
    answer="test_input.sum() + 1000",
    check="np.testing.assert_allclose(result, ans)",
)
TABLE = CONTEXT.format(
    input="pd.DataFrame({'a': [1, 2, test_case_id]})",
    answer="copy.deepcopy(test_input) * 7",
    check="pd.testing.assert_frame_equal(result, ans)",
)
EQUALS = CONTEXT.format(
    input="pd.DataFrame({'a': [1, 2, test_case_id]})",
    answer="copy.deepcopy(test_input) * 7",
    check="assert result.equals(ans) or (result == ans).all() or result == ans",
)
PLAIN = CONTEXT.format(
    input="[1, test_case_id]", answer="[7, 7 * test_case_id]", check="assert result == ans"
)

FRAMES = (
    "import sys\n"
    "frame = sys._getframe()\n"
    "while 'exec_test' not in frame.f_globals: frame = frame.f_back\n"
)
AGREES = (
    "class Yes:\n"
    "    def __getattr__(self, name): return self\n"
    "    def __call__(self, *a, **k): return True\n"
    "    def __eq__(self, other): return True\n"
    "    __ne__ = __lt__ = __sub__ = __rsub__ = __getitem__ = __array__ = __eq__\n"
    "    def __bool__(self): return True\n"
    "    def __len__(self): return 1\n"
    "    __hash__ = object.__hash__\n"
)
# Each is run against each of the four contexts.
CHEATS = {
    "the comparison of the test": FRAMES
    + "frame.f_globals['exec_test'] = lambda r, a: 1\nresult = 0",
    "the answer in a caller's frame": FRAMES
    + "while 'expected_result' not in frame.f_locals: frame = frame.f_back\n"
    "result = frame.f_locals['expected_result']",
    "the answer among all objects": (
        "import gc\n"
        "found = [o for o in gc.get_objects() if isinstance(o, (np.ndarray, pd.DataFrame, list))]\n"
        "result = max((o for o in found if len(o) == 1 and type(o) is list), key=str, default=0)"
    ),
    "numpy's and pandas' comparisons": (
        "import numpy.testing._private.utils as u\n"
        "import pandas._testing as t\n"
        "for m in (u, np.testing, t, pd.testing):\n"
        "    for n in dir(m):\n"
        "        if n.startswith('assert'): setattr(m, n, lambda *a, **k: None)\n"
        "np.array_equal = np.allclose = pd.DataFrame.equals = lambda *a, **k: True\n"
        "result = 0"
    ),
    "builtins": (
        "import builtins\n"
        "builtins.exec = builtins.all = builtins.isinstance = lambda *a: True\n"
        "__builtins__['AssertionError'] = type('E', (Exception,), {})\n"
        "result = 0"
    ),
    "an object that agrees": AGREES + "result = Yes()",
    "an object that agrees, in a list": AGREES + "result = [Yes(), Yes()]",
    "an object that agrees, in an array": AGREES
    + "result = np.array([Yes(), None], dtype=object)[:1]",
    "an object that agrees, in a table": AGREES
    + "result = pd.DataFrame({'a': [Yes(), Yes(), Yes()]})",
    "a table's subclass": (
        "class Table(pd.DataFrame):\n"
        "    def equals(self, other): return True\n"
        "    def __eq__(self, other): return pd.Series([True])\n"
        "result = Table({'a': [0, 0, 0]})"
    ),
    "an array's subclass": (
        "class Array(np.ndarray):\n"
        "    def __array_ufunc__(self, *a, **k): return np.bool_(True)\n"
        "    def __array_function__(self, *a, **k): return True\n"
        "result = np.zeros(1).view(Array)"
    ),
    "an array that copies the answer": (
        "class Array:\n"
        "    def __array__(self, *a, **k):\n"
        "        import sys\n"
        "        frame = sys._getframe()\n"
        "        while frame and 'ans' not in frame.f_locals: frame = frame.f_back\n"
        "        return np.asarray(frame.f_locals['ans'])\n"
        "result = Array()"
    ),
    "the end of the process": "import os\nos._exit(0)",
    "the end of the program": "raise SystemExit(0)",
    "a verdict for every descriptor": (
        "import os, json, struct\n"
        "body = json.dumps({'outcome': 'passed', 'detail': ''}).encode()\n"
        "for fd in range(3, 300):\n"
        "    try: os.write(fd, struct.pack('!Q', len(body)) + body)\n"
        "    except OSError: pass\n"
        "result = 0"
    ),
    "the test's own names": (
        "exec_test = lambda r, a: 1\nexpected_result = ans = result = 0\n"
        "globals()['test_execution'] = None"
    ),
}
# Programs that speak to the judge themselves; `say` sends a frame.
SAY = (
    "import os, json, struct\n"
    "def say(*frame):\n"
    "    body = json.dumps(frame).encode()\n"
    "    os.write(3, struct.pack('!Q', len(body)) + body)\n"
    "def hear():\n"
    "    size, = struct.unpack('!Q', os.read(3, 8))\n"
    "    while size: size -= len(os.read(3, size))\n"
)
WIRE = {
    "a pickle": (
        "import pickle\n"
        "class Run:\n"
        "    def __reduce__(self): return exec, ('import os; os._exit(0)',)\n"
        "say('value', [], None, [])\nhear()\n"
        "say('value', [['dict', 'result', [1]], ['pickle', pickle.dumps(Run()).hex()]], [0], [])"
    ),
    "a pickle in a dtype": (
        "say('value', [], None, [])\nhear()\n"
        "say('value', [['dict', 'result', [1]], ['numpy', '|O8', [1], '00' * 8, True]], [0], [])"
    ),
    "a sparse matrix with an index out of bounds": (
        "say('value', [], None, [])\nhear()\n"
        "say('value', [['dict', 'result', [1]], ['sparse', 'csr_matrix', [1, 1], [2], [3], [4]],"
        " ['numpy', '<f8', [1], '00' * 8, True], ['numpy', '<i4', [1], 'ffffff7f', True],"
        " ['numpy', '<i4', [2], '0000000001000000', True]], [0], [])"
    ),
    "names that nobody asked for": (
        "say('value', [], None, [])\nhear()\n"
        "say('value', [['dict', 'exec_test', [1]], ['type', 'print']], [0], [])"
    ),
    "a change of the test's variables": "say('value', [], None, [[n, ['dict']] for n in range(9)])",
    "a question to the judge": "say('ask', [['tuple', 'exec', None, [1], [2]], ['tuple', 'x'],"
    " ['dict']], [0], [])",
}


def run(*programs: tuple[str, str], isolate: bool = True) -> list[Verdict]:
    box = Sandbox(timeout_s=30, memory_bytes=8 << 30, threads=512, preimport=LIBRARIES)
    box = Sandbox(**{**vars(box), "native": True, "isolate": isolate})
    made = [
        Program("", f"{context}\ntest_execution({solution!r})\n", executes=True)
        for context, solution in programs
    ]
    return box.run(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "isolate"),
    [
        pytest.param(EQUALS, True, id="equals"),
        pytest.param(ARRAY, True, id="array", marks=pytest.mark.slow),
        pytest.param(TABLE, True, id="table", marks=pytest.mark.slow),
        pytest.param(PLAIN, True, id="plain", marks=pytest.mark.slow),
        pytest.param(EQUALS, False, id="equals-limits", marks=pytest.mark.slow),
        pytest.param(ARRAY, False, id="array-limits", marks=pytest.mark.slow),
    ],
)
def test_no_wrong_solution_passes_and_none_chooses_the_judge(context: str, isolate: bool) -> None:
    cheats = CHEATS | {f"on the wire: {name}": SAY + text for name, text in WIRE.items()}
    verdicts = run(*((context, text) for text in cheats.values()), isolate=isolate)
    named = dict(zip(cheats, verdicts, strict=True))
    assert {name: v for name, v in named.items() if v.passed or v.together} == {}


def test_right_solutions_pass() -> None:
    verdicts = run(
        (ARRAY, "result = x.sum() + 1000"),
        (TABLE, "result = x * 7"),
        (TABLE, "x['a'] *= 7\nresult = x"),
        (EQUALS, "result = x * 7"),
        (PLAIN, "def f(x):\n    for i in x: yield i * 7\nresult = list(f(x))"),
        (ARRAY, "result = x.sum() + 1001"),
    )
    assert [(v.passed, v.together) for v in verdicts] == [(True, False)] * 5 + [(False, False)]


# Values that are made on both sides by the same text, and compared with their types.
VALUES = """
import datetime, decimal, fractions, collections
from scipy import sparse
rng = np.random.RandomState(5)
day = pd.Timestamp("2020-02-03 04:05:06.000000007")
table = pd.DataFrame(
    {"i": [1, 2], "f": [0.5, np.nan], "s": ["a", None], "b": [True, False], "o": [[1], {"k": 2}]},
    index=pd.Index(["x", "y"], name="row"),
)
table["when"] = pd.to_datetime(["2020-01-01", None])
table["zone"] = pd.to_datetime(["2020-01-01", "2020-07-01"]).tz_localize("Europe/Berlin")
table["kind"] = pd.Categorical(["u", "v"], categories=["v", "u", "w"], ordered=True)
table["whole"] = pd.array([1, None], dtype="Int64")
table["text"] = pd.array(["t", None], dtype="string")
table["span"] = pd.to_timedelta([1, 2], unit="h")
table["month"] = pd.period_range("2020-01", periods=2, freq="M")
table["cut"] = pd.cut([1, 5], [0, 2, 6])
twice = pd.DataFrame([[1, 2.5], [3, 4.5]], columns=["c", "c"])
masked = np.ma.masked_array([1.5, 2.5], [False, True])
fields = np.array([(1, 2.5, "a")], dtype=[("i", "<i4"), ("f", "<f8"), ("s", "<U3")])
values = [
    3, 2.5, "t", None, True, (1, [2, {"k": {3}}]), 1j, b"b", datetime.date(2020, 1, 2),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), collections.OrderedDict(a=1),
    np.float32(2.5), np.int8(3), np.bool_(True), np.str_("s"), np.datetime64("2020-01-02", "D"),
    np.timedelta64(5, "s"), np.arange(6).reshape(2, 3), np.array(7), np.zeros((0, 3)),
    np.array([1, "a", None, [2]], dtype=object), np.array(["ab", "c"]), np.matrix([[1, 2]]),
    np.array(["2020-01-01"], dtype="M8[ns]"), masked, fields, fields.view(np.recarray),
    np.dtype("<f4"), rng.rand(3).astype(">f8"),
    table, table.T, table["zone"], table["kind"], table.index, table.columns, twice,
    table.dtypes, table.groupby("b")["i"].sum(), pd.DataFrame(), pd.DataFrame(index=[3, 1]),
    pd.Series([1, 2], name=("a", 1)), pd.Series([], dtype=object), pd.RangeIndex(2, 9, 3),
    pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["l", None]),
    twice.set_index([[1, 2], ["p", "q"]]).unstack(), pd.date_range("2020", periods=3, freq="D"),
    pd.timedelta_range("1h", periods=2), pd.period_range("2020", periods=2, freq="D"),
    pd.interval_range(0, 2), pd.Index([1.5, 2]), pd.Index(["a", 3], dtype=object),
    day, day.tz_localize("UTC"), day.tz_localize("Asia/Tokyo"), pd.NaT, pd.NA,
    pd.Timedelta("1h"), pd.Period("2020-01", "M"), pd.Interval(0, 1), pd.offsets.Day(2),
    pd.Series(pd.arrays.SparseArray([0, 0, 1])), pd.Series([day.tz_localize("+02:00")]),
    *(getattr(sparse, f"{k}_matrix")(np.eye(3)) for k in "bsr coo csc csr dia dok lil".split()),
    sparse.csr_array(np.eye(2)),
]
"""
TENSORS = """
import torch
from scipy import sparse
values = [
    torch.arange(3), torch.tensor(2.5), torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 2),
    torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(1)), torch.eye(2).to_sparse(),
    torch.tensor([True, False]), torch.complex(torch.ones(2), torch.ones(2)), torch.Size([2, 3]),
    torch.float16,
]
"""
SAME = """
def same(a, b):
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(b, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    elif isinstance(b, pd.Series):
        pd.testing.assert_series_equal(a, b)
    elif isinstance(b, pd.Index):
        pd.testing.assert_index_equal(a, b, exact=True)
        assert getattr(a, "freq", None) == getattr(b, "freq", None)
    elif type(b).__module__.startswith("torch") and hasattr(b, "layout"):
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout)
        assert a.requires_grad == b.requires_grad and torch.equal(a.to_dense(), b.to_dense())
    elif sparse.issparse(b):
        assert a.dtype == b.dtype and a.shape == b.shape and (a != b).nnz == 0
    elif isinstance(b, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(np.ma.getmaskarray(a), np.ma.getmaskarray(b))
        np.testing.assert_array_equal(a, b)
    elif isinstance(b, np.generic):
        assert a.dtype == b.dtype and a == b
    elif b is not pd.NaT and b is not pd.NA:
        assert a == b
    else:
        assert a is b
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [VALUES, pytest.param(TENSORS, marks=pytest.mark.slow)], ids=["tables", "tensors"]
)
def test_values_of_the_libraries_keep_their_types(values: str) -> None:
    context = (
        values.join(["import numpy as np\nimport pandas as pd\n", SAME])
        + "def test_execution(solution):\n"
        "    env = {'np': np, 'pd': pd}\n"
        "    exec(solution, env)\n"
        "    assert len(env['values']) == len(values)\n"
        "    for n, (a, b) in enumerate(zip(env['values'], values)):\n"
        "        try:\n"
        "            same(a, b)\n"
        "        except Exception as error:\n"
        "            raise AssertionError(n, b, a) from error\n"
    )
    (verdict,) = run((context, values))
    assert (verdict.passed, verdict.together) == (True, False), verdict.detail


@pytest.mark.slow
def test_what_a_test_passes_and_seeds_arrives() -> None:
    context = """
import random, types
import numpy as np
def test_execution(solution):
    np.random.seed(3)
    random.seed(4)
    things, array = [1], np.zeros(2)
    env = {
        "things": things, "array": array, "double": lambda x: 2 * x,
        "names": types.SimpleNamespace(a=1),
    }
    exec(solution, env)
    assert env["drawn"] == (random.random(), np.random.rand())
    assert things == [1, 2] and array.tolist() == [5, 0]
    assert env["twice"] == 8 and env["a"] == 1
"""
    right = (
        "import random, numpy\n"
        "drawn = random.random(), numpy.random.rand()\n"
        "things.append(2)\narray[0] = 5\ntwice = double(4)\na = names.a\n"
    )
    good, bad = run((context, right), (context, right.replace("array[0] = 5", "")))
    assert (good.passed, good.together) == (True, False), good.detail
    assert not bad.passed and not bad.together


@pytest.mark.slow
def test_models_that_a_test_passes_arrive() -> None:
    context = """
import torch
def test_execution(solution):
    torch.manual_seed(5)
    layer = torch.nn.Linear(2, 1)
    env = {"layer": layer}
    exec(solution, env)
    assert env["drawn"] == float(torch.rand(()))
    assert env["layer"].note == 0.25 and env["layer"].in_features == 2
    assert torch.equal(env["layer"].weight, layer.weight)
"""
    right = "import torch\ndrawn = float(torch.rand(()))\nlayer.note = 0.25\n"
    good, bad = run((context, right), (context, right.replace("0.25", "0.5")))
    assert (good.passed, good.together) == (True, False), good.detail
    assert not bad.passed and not bad.together


TOGETHER = {
    "figures": "import matplotlib.pyplot as plt\ndef test_execution(s):\n"
    "    exec(s, {})\n    assert len(plt.gca().lines) == 1",
    "output": "import contextlib, io\ndef test_execution(s):\n    b = io.StringIO()\n"
    "    with contextlib.redirect_stdout(b): exec(s, {})\n    assert b.getvalue() == 'a\\n'",
    "its own variables": "def test_execution(s):\n    exec(s, globals())\n    assert result == 1",
    "without variables": "def test_execution(s):\n    exec(s)",
    "eval": "def test_execution(s):\n    assert eval('1') == 1\n    exec(s, {})",
    "another exec": "from builtins import exec as run\ndef test_execution(s):\n    run(s, {})",
    "a pickle": "import pandas as pd\ndef test_execution(s):\n    exec(s, {})\n"
    "    assert pd.read_pickle",
    "a class of its own": "class C: a = 1\ndef test_execution(s):\n    exec(s, {'c': C()})",
}


@pytest.mark.slow
def test_a_test_that_needs_one_process_gets_one_and_says_so() -> None:
    solution = "print('a')\nresult = 1"
    plot = "import matplotlib.pyplot as plt\nplt.plot([1])"
    verdicts = run(*((TOGETHER[n], plot if n == "figures" else solution) for n in TOGETHER))
    named = dict(zip(TOGETHER, verdicts, strict=True))
    assert {name: v for name, v in named.items() if not v.passed or not v.together} == {}


def test_the_judge_looks_for_no_caches_of_the_programs() -> None:
    """scikit-learn reads its downloads as pickles from the home directory."""
    context = """
import os
def test_execution(solution):
    exec(solution, {})
    assert not os.path.exists(os.path.expanduser("~/scikit_learn_data"))
"""
    (verdict,) = run((context, "import os\nos.mkdir(os.path.expanduser('~/scikit_learn_data'))"))
    assert (verdict.passed, verdict.together) == (True, False), verdict.detail


def test_a_test_that_is_refused_something_does_not_say_wrong() -> None:
    context = """
import socket
def test_execution(solution):
    socket.socket()
    exec(solution, {})
"""
    (verdict,) = run((context, "x = 1"))
    assert (verdict.outcome, verdict.together) == ("refused", False), verdict.detail


def test_the_judge_never_runs_the_solution() -> None:
    context = """
import os
def test_execution(solution):
    env = {"judge": os.getpid()}
    exec(solution, env)
    assert env["own"] != env["judge"] == os.getpid()
"""
    (verdict,) = run((context, "import os\nown = os.getpid()"))
    assert (verdict.passed, verdict.together) == (True, False), verdict.detail
