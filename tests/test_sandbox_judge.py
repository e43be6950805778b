"""Judge and program are two processes: what a program replaces, returns or reads does not matter.

The programs of `CHEATS` that issue 14 names pass on 538a493; `HONEST` ones fail there where noted.
"""

import gc
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.humaneval import program as humaneval_program
from tasks.sandbox import Program, Sandbox, requirements, run_programs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

FRACTION = """
def check(candidate):
    assert abs(candidate(1.33) - 0.33) < 1e-6
    assert abs(candidate(123.456) - 0.456) < 1e-6
check(f)
"""
PLAIN = """
def check(candidate):
    assert candidate(1) == 2
    assert candidate(3) == 4
    assert candidate([1]) == [2]
check(f)
"""
LENGTHS = """
def check(candidate):
    assert tuple(candidate([3, 1, 2])) == (1, 2, 3)
    assert len(candidate([3, 1, 2])) == 3
    assert sorted(candidate([5])) == [5]
    assert 5 in candidate([5])
check(f)
"""
POLY_PROMPT = """import math
def poly(xs, x):
    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])
def find_zero(xs: list):
    '''Find x such that poly(x) = 0.'''
"""
POLY_TEST = """
def check(candidate):
    import math, random, copy
    rng = random.Random(42)
    for _ in range(20):
        coeffs = [rng.randint(1, 10), rng.randint(1, 10)]
        assert math.fabs(poly(coeffs, candidate(copy.deepcopy(coeffs)))) < 1e-4
"""
POLY_ROW = {"prompt": POLY_PROMPT, "test": POLY_TEST, "entry_point": "find_zero"}

CHEATS = {
    "abs of the namespace": ("def f(x): return 9\nabs = lambda x: 0", FRACTION),
    "abs of the namespace, in a call": (
        "def f(x):\n    globals()['abs'] = lambda x: 0\n    return 9",
        FRACTION,
    ),
    "builtins of the caller": (
        "import sys\ndef f(x):\n    sys._getframe(1).f_builtins['abs'] = lambda x: 0\n    return 9",
        FRACTION,
    ),
    "an object that equals everything": (
        "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()",
        PLAIN,
    ),
    "an object that equals everything, in a list": (
        "class E:\n    def __eq__(s, o): return True\n"
        "def f(x): return [E()] if isinstance(x, list) else x + 1",
        PLAIN,
    ),
    "an object that passes for a number": (
        "class E:\n    def __eq__(s, o): return True\n    __class__ = property(lambda s: int)\n"
        "def f(x): return E()",
        PLAIN,
    ),
    "an int that equals everything": (
        "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
        "def f(x): return E(0)",
        PLAIN,
    ),
    "a float without differences": (
        "class E(float):\n    def __sub__(s, o): return 0.0\ndef f(x): return E(9)",
        FRACTION,
    ),
    "an object without differences": (
        "class E:\n    def __sub__(s, o): return 0.0\ndef f(x): return E()",
        FRACTION,
    ),
    "a list that contains everything": (
        "class E(list):\n"
        "    def __iter__(s): return iter((1, 2, 3))\n"
        "    def __len__(s): return 3\n"
        "    def __contains__(s, x): return True\n"
        "def f(x): return E()",
        LENGTHS,
    ),
    "a number of numpy that equals everything": (
        "import numpy\n"
        "class E(numpy.ndarray):\n"
        "    def __eq__(s, o): return numpy.bool_(True)\n"
        "def f(x): return numpy.zeros(1).view(E)",
        PLAIN,
    ),
    "a function of the test's modules": (
        "import random, copy, math\n"
        "random.Random.randint = lambda s, a, b: 0\n"
        "math.fabs = lambda x: 0\n"
        "copy.deepcopy.__code__ = (lambda x, memo=None, _nil=[]: x).__code__\n"
        "abs = math.fabs\n"
        "def f(x): return 9",
        FRACTION,
    ),
    "the constants of the test": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for v in [*frame.f_code.co_consts, *frame.f_locals.values()]:\n"
        "            if 'check' in str(getattr(v, 'co_name', v)): return x + 1 if x == 1 else 4\n"
        "        frame = frame.f_back\n",
        PLAIN,
    ),
    "answers before they are asked": (
        "import os, json, struct\n"
        "for answer in ({'f': 1}, 2, 4, [2]):\n"
        "    body = json.dumps(['value', [], True, []]).encode()\n"
        "    os.write(3, struct.pack('!Q', len(body)) + body)\n"
        "def f(x): return 0",
        PLAIN,
    ),
    "a verdict for every descriptor": (
        "import os, json, struct\n"
        "def f(x):\n"
        "    word = {'outcome': 'passed', 'detail': '', 'seconds': 0.0}\n"
        "    body = json.dumps(word).encode()\n"
        "    for fd in range(2000):\n"
        "        try: os.write(fd, struct.pack('!Q', len(body)) + body)\n"
        "        except OSError: pass\n"
        "    return 0",
        PLAIN,
    ),
    "a request to the judge": (
        "import os, json, struct\n"
        "def f(x):\n"
        "    for node in (['type', 'type'], ['mine', 0, 'function'], ['yours', 0]):\n"
        "        nodes = [['tuple', 'call', [1], [2], [3]], node, ['tuple'], ['dict']]\n"
        "        body = json.dumps(['ask', nodes, [0], []]).encode()\n"
        "        os.write(3, struct.pack('!Q', len(body)) + body)\n"
        "    return 0",
        PLAIN,
    ),
    "answers of its own making, with more names than were asked for": (
        "import os, json, struct\n"
        "def read(n):\n"
        "    data = b''\n"
        "    while len(data) < n: data += os.read(3, n - len(data)) or os._exit(0)\n"
        "    return data\n"
        "def ask(): return json.loads(read(struct.unpack('!Q', read(8))[0]))\n"
        "def answer(nodes, value):\n"
        "    body = json.dumps(['value', nodes, value, []]).encode()\n"
        "    os.write(3, struct.pack('!Q', len(body)) + body)\n"
        "os.write(3, b'.')\n"
        "n = len(ask()[1])\n"
        "names = ['f', [n + 1], 'abs', [n + 2], '__builtins__', [n + 3], 'check', [n + 2]]\n"
        "answer([['dict', *names], *(['mine', k, 'function'] for k in range(2)),\n"
        "        ['dict', 'abs', [n + 2], 'print', [n + 2]]], [n])\n"
        "while True:\n"
        "    ask()\n"
        "    answer([], 0)",
        FRACTION,
    ),
    "an endless answer": ("import os\ndef f(x):\n    os.write(3, b'\\xff' * 16)\n", PLAIN),
    "contents for what the test did not pass": (
        "import os, json, struct\n"
        "def f(x):\n"
        "    body = json.dumps(['value', [], 2, [[-1, ['list']], [0, ['dict']]]]).encode()\n"
        "    os.write(3, struct.pack('!Q', len(body)) + body)\n"
        "    os._exit(0)",
        PLAIN,
    ),
    "the end": ("import os\ndef f(x): os._exit(0)", PLAIN),
    "native code that ends": ("import ctypes\ndef f(x): ctypes.CDLL(None).exit(0)", PLAIN),
}

# Right programs for `def f(x)` that doubles a number.
HONEST = {
    "asyncio": (  # fails on 538a493, like the next six
        "import asyncio\n"
        "async def g(x):\n    await asyncio.sleep(0)\n    return x * 2\n"
        "def f(x): return asyncio.run(g(x))"
    ),
    "types.coroutine": (
        "import types\n"
        "@types.coroutine\n"
        "def g(x):\n    yield\n    return x * 2\n"
        "def f(x):\n"
        "    c = g(x)\n"
        "    try:\n        while 1: c.send(None)\n"
        "    except StopIteration as e: return e.value"
    ),
    "an executor at module level": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "p = ThreadPoolExecutor(2)\n"
        "r = list(p.map(int, [1]))\n"
        "def f(x): return p.submit(lambda: x * 2).result()"
    ),
    "unittest.mock": (
        "from unittest import mock\n"
        "def f(x):\n    with mock.patch('builtins.print'): print(1)\n    return x * 2"
    ),
    "cProfile": (
        "import cProfile\n"
        "def f(x):\n    p = cProfile.Profile(); p.enable(); p.disable(); return x * 2"
    ),
    "ctypes": "import ctypes\ndef f(x): return ctypes.c_int(x * 2).value",
    "pickle of an own class": (
        "import pickle\n"
        "class A:\n    def __init__(s, x): s.x = x\n"
        "def f(x): return pickle.loads(pickle.dumps(A(x))).x * 2"
    ),
    "gc.get_objects": "import gc\ndef f(x): return x * 2 * bool(gc.get_objects())",
    "a mark of the encoding": "\ufeffdef f(x): return x * 2",
    "a Counter": "from collections import Counter\ndef f(x): return Counter('a' * x)['a'] * 2",
    "a callable object": "class F:\n    def __call__(s, x): return x * 2\nf = F()",
    "a number of numpy": "import numpy\ndef f(x): return numpy.int64(x) * 2",
    "a Fraction": "from fractions import Fraction\ndef f(x): return Fraction(x) * 2",
    "an IntEnum": "import enum\nE = enum.IntEnum('E', {'A': 4})\ndef f(x): return E.A",
    "an own sum": "def sum(*a): return 0\ndef f(x): return x * 2",
}
LIBRARIES = {
    "sympy": "import sympy\ndef f(x): return int(sympy.Integer(x) * 2)",
    "pandas": "import pandas as pd\ndef f(x): return int(pd.Series([x, x]).sum())",
    "scipy": (
        "from scipy.optimize import brentq\n"
        "def f(x): return round(brentq(lambda y: y - 2 * x, 0, 9))"
    ),
    "sklearn": "import sklearn.linear_model\ndef f(x): return x * 2",
}
# Programs and tests whose values are of other kinds; all of them are right.
CROSSING = {
    "a list that is changed": (
        "def f(x):\n    x.sort()\n    x.append([9])",
        "l = [3, 1]\nassert f(l) is None and l == [1, 3, [9]]",
    ),
    "a dict in a list that is changed": (
        "def f(x):\n    x[0]['b'] = {1}\n    return x[0]",
        "d = {'a': 1}\nl = [d]\nr = f(l)\nassert r is d and d == {'a': 1, 'b': {1}}",
    ),
    "the argument itself": ("def f(x): return x", "l = [1, 2]\nassert f(l) is l"),
    "a Counter and a defaultdict": (
        "from collections import *\n"
        "def f(x):\n    d = defaultdict(list)\n    d[x].append(x)\n    return Counter(x), d",
        "c, d = f('a')\nassert c == {'a': 1} and c['z'] == 0 and d == {'a': ['a']} and d[5] == []",
    ),
    "a namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x): return P(x, 2)",
        "assert f(1) == (1, 2) and f(1).b == 2 and isinstance(f(1), tuple)",
    ),
    "a generator": (
        "def f(x):\n    i = 0\n    while True:\n        yield i\n        i += x",
        "import itertools\nassert list(itertools.islice(f(2), 3)) == [0, 2, 4] and next(f(1)) == 0",
    ),
    "map, keys and items": (
        "def f(x): return map(str, x), {1: 2}.keys(), {1: 2}.items(), {1: 2}.values()",
        "m, k, i, v = f([1])\n"
        "assert list(m) == ['1'] and k == {1} and i == {(1, 2)} and list(v) == [2]",
    ),
    "an array": (
        "import numpy\ndef f(x):\n    x += 1\n    return x * 2, numpy.float32(0.1)",
        "import numpy\n"
        "a = numpy.zeros((2, 2))\n"
        "b, c = f(a)\n"
        "assert (a == 1).all() and (b == 2).all() and b.shape == (2, 2)\n"
        "assert c == numpy.float32(0.1)",
    ),
    "a function of the test's": (
        "def f(g, xs): return [g(x) for x in xs], sorted(xs, key=g)",
        "assert f(lambda x: -x, [1, 2]) == ([-1, -2], [2, 1])\n"
        "assert f(len, ['ab', 'c'])[0] == [2, 1]",
    ),
    "a generator of the test's": (
        "def f(xs): return next(xs) + next(xs)",
        "import itertools\nassert f(itertools.count(3)) == 7 and f(x for x in (1, 2)) == 3",
    ),
    "an exception by type": (
        "class Mine(ValueError): pass\n"
        "def f(x):\n    if x: raise Mine('no', 3)\n    raise KeyError(x)",
        "try: f(1)\n"
        "except ValueError as e: assert e.args == ('no', 3)\n"
        "else: assert False\n"
        "try: f(0)\n"
        "except LookupError as e: assert e.args == (0,)\n"
        "else: assert False",
    ),
    "an object's methods": (
        "class Stack:\n"
        "    def __init__(s): s.items = []\n"
        "    def push(s, x): s.items.append(x)\n"
        "    def pop(s): return s.items.pop()\n"
        "    def __len__(s): return len(s.items)\n",
        "s = Stack()\ns.push(3)\ns.push('a')\n"
        "assert len(s) == 2 and s.pop() == 'a' and s.items == [3]",
    ),
    "an object that goes back": (
        "class Tree: pass\n"
        "def grow(x):\n    t = Tree()\n    t.leaf = x\n    return t\n"
        "def leaf(t): return t.leaf",
        "t = grow([1])\nassert leaf(t) == [1] and leaf(grow(5)) == 5",
    ),
    "odd numbers and texts": (
        "def f(x): return x",
        "big = 3 ** 20000\n"
        "assert f(big) == big and f(-big) == -big and f(2 ** 63) == 2 ** 63\n"
        "nan = f(float('nan'))\n"
        "assert nan != nan and f(float('-inf')) == float('-inf') and str(f(-0.0)) == '-0.0'\n"
        "for t in ('\\ud800', '\\ud83d\\ude00', 'é\\0', b'\\xff', 1j, range(5), True, None, ...):\n"
        "    if t is not ...: assert f(t) == t and type(f(t)) is type(t)",
    ),
    "deep and cyclic values": (
        "def f(x): return x",
        "deep = ()\n"
        "for _ in range(20000): deep = (deep,)\n"
        "back, n = f(deep), 0\n"
        "while back: back, n = back[0], n + 1\n"
        "assert n == 20000\n"
        "l = [1]\nl.append(l)\n"
        "r = f([l])\n"
        "assert r[0][1] is r[0]",
    ),
    "a helper of its own": ("def g(x): return x + 1\ndef f(x): return g(x)", "assert f(1) == g(1)"),
    "a constant": ("N = 5\ndef f(x): return x + N", "assert f(1) == 6 and N == 5"),
    "the test's imports": ("def f(x): return math.sqrt(x)", "import math\nassert f(4) == 2"),
    "the program's imports": ("import math\ndef f(x): return x", "assert math.sqrt(f(4)) == 2"),
}
# Tests that need the program in their own process.
TOGETHER = {
    "an object of the test's": (
        "def f(x): return x.a",
        "from types import SimpleNamespace as S\nassert f(S(a=1)) == 1",
    ),
    "a class of the test's": (
        "def f(x): return Node(x).x",
        "class Node:\n    def __init__(s, x): s.x = x\nassert f(3) == 3",
    ),
    "the function's name": ("def f(x):\n    'doc'\n", "assert f.__doc__ == 'doc'"),
    "what the program prints": (
        "def f(x): print(x)",
        "import io, contextlib\n"
        "b = io.StringIO()\n"
        "with contextlib.redirect_stdout(b): f(3)\n"
        "assert b.getvalue() == '3\\n'",
    ),
    "a seed": (
        "import random\ndef f(): return random.random()",
        "import random\nrandom.seed(1)\na = random.random()\nrandom.seed(1)\nassert f() == a",
    ),
}


@pytest.mark.parametrize("isolate", [True, False], ids=["namespaces", "limits"])
def test_no_cheat_passes_and_none_chooses_the_judge(isolate: bool) -> None:
    verdicts = run_programs([Program(*pair) for pair in CHEATS.values()], isolate=isolate)
    named = dict(zip(CHEATS, verdicts, strict=True))
    assert {name: v for name, v in named.items() if v.passed or v.together} == {}


def test_the_helpers_of_a_prompt_are_the_judges() -> None:
    """Fails on 538a493: `poly = lambda *a: 0` passes HumanEval/32."""
    wrong = "    return 7\n"
    cheats = [
        wrong + "poly = lambda *a: 0\n",
        wrong + "poly.__code__ = (lambda xs, x: 0).__code__\n",
        "    globals()['poly'] = lambda *a: 0\n    return 7\n",
        "    xs[:] = [0, 0]\n    return 7\nimport copy\ncopy.deepcopy = lambda x: x\n",
        wrong + "import math\nmath.fabs = lambda x: 0\n",
    ]
    verdicts = run_programs([humaneval_program(POLY_ROW, text) for text in cheats])
    assert [(v.passed, v.together) for v in verdicts] == [(False, False)] * len(cheats)
    right = humaneval_program(POLY_ROW, "    return -xs[0] / xs[1]\n")
    assert run_programs([right])[0].passed
    # Without the prompt, a name that is defined twice is what can be told.
    bare = Program(POLY_PROMPT + wrong + "poly = lambda *a: 0", POLY_TEST + "check(find_zero)")
    assert "poly" in run_programs([bare])[0].detail


def test_honest_programs_pass() -> None:
    test = "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)"
    verdicts = run_programs([Program(code, test) for code in HONEST.values()], timeout_s=10)
    named = dict(zip(HONEST, verdicts, strict=True))
    assert {name: v for name, v in named.items() if not v.passed or v.together} == {}


@pytest.mark.slow
def test_the_libraries_that_models_use_work() -> None:
    """Fails on 538a493: all of them load ctypes."""
    test = "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)"
    verdicts = run_programs([Program(code, test) for code in LIBRARIES.values()], timeout_s=30)
    assert {n: v for n, v in zip(LIBRARIES, verdicts, strict=True) if not v.passed} == {}


@pytest.mark.slow
def test_values_of_all_kinds_cross() -> None:
    verdicts = run_programs([Program(*pair) for pair in CROSSING.values()])
    named = dict(zip(CROSSING, verdicts, strict=True))
    assert {name: v for name, v in named.items() if not v.passed or v.together} == {}


def test_a_test_that_needs_one_process_gets_one_and_says_so() -> None:
    verdicts = run_programs([Program(*pair) for pair in TOGETHER.values()])
    named = dict(zip(TOGETHER, verdicts, strict=True))
    assert {name: v for name, v in named.items() if not v.passed or not v.together} == {}


def test_refused_is_not_wrong() -> None:
    """Fails on 538a493: both are "failed"."""
    programs = [
        Program("import os\ndef f(x): return os.fork()", "assert f(1) == 2"),
        Program("import socket\ns = socket.socket()\ndef f(x): return 2", "assert f(1) == 2"),
        Program("def f(x): return open('/refused', 'w')", "assert f(1) == 2"),
        Program("def f(x): return 3", "assert f(1) == 2"),
        Program("def f(x): raise ValueError(x)", "assert f(1) == 2"),
    ]
    verdicts = run_programs(programs, isolate=False)
    assert [v.outcome for v in verdicts] == ["refused"] * 3 + ["failed"] * 2


def test_descriptors_of_the_harness_do_not_reach_a_program() -> None:
    """Fails on 538a493: with 300 open files, the fake passes and shifts every later verdict."""
    fake = Program(*CHEATS["a verdict for every descriptor"])
    right = Program("def f(x): return [2] if x == [1] else x + 1", PLAIN)
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    try:
        verdicts = Sandbox(workers=1).run([fake, right, fake, right, right])
    finally:
        for descriptor in kept:
            os.close(descriptor)
    assert [v.passed for v in verdicts] == [False, True, False, True, True]


def test_the_test_is_not_among_the_programs_objects() -> None:
    """The server never reads the test, so a program finds no answers in its own process."""
    look = (
        "import gc, sys\n"
        "def f(x):\n"
        "    word, seen, todo = 'needle' + '-4711', set(), [sys._getframe(), *gc.get_objects()]\n"
        "    while todo:\n"
        "        thing = todo.pop()\n"
        "        if id(thing) in seen: continue\n"
        "        seen.add(id(thing))\n"
        "        if type(thing) in (str, bytes) and word in str(thing) and len(thing) > 30:\n"
        "            return 'found'\n"
        "        todo += gc.get_referents(thing)\n"
        "    return 'nothing'"
    )
    test = "answer = f('x')\nassert answer == 'nothing', answer  # needle-4711"
    apart = [Program(look, test)] * 2
    verdicts = Sandbox(workers=1, timeout_s=20).run(apart)
    assert all(v.passed for v in verdicts), verdicts


def test_threads_read_tests_beside_each_other():
    """Python 3.11 fails where a collection lets another thread in (python/cpython#106905)."""
    test = (
        "def check(f):\n    assert f([{0}, [{1}, [3, (4, 5)]]]) == {{'a': [1, {{'b': (3, 4)}}]}}\n"
    )

    def read(thread: int) -> list[object]:
        return [requirements._read(test.format(thread, number)) for number in range(30)]

    def let_others_in(*_: object) -> None:
        time.sleep(1e-5)

    before = gc.get_threshold()
    gc.callbacks.append(let_others_in)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, range(4)))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(let_others_in)
    assert all(each is not None for part in found for each in part)
