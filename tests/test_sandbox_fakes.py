"""Programs that pretend to be right: the sandbox lets none of them pass."""

import sys
from dataclasses import replace

import pytest

from tasks.sandbox import Program, run_programs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

# What must fail, whatever the kernel allows.
FAKES = {
    "sys.exit": "import sys; sys.exit(0)",
    "raise SystemExit": "raise SystemExit(0)",
    "exit": "exit(0)",
    "os._exit": "import os; os._exit(0)",
    "StopIteration": "raise StopIteration",
    "GeneratorExit": "raise GeneratorExit",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "zero bytes to the verdict": "import os; os.write(3, bytes(16)); os._exit(0)",
    "zero bytes, then the end": "import os; os.write(3, bytes(16))",
    "every channel": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    for word in (b'passed', b'.', b'1', bytes(16)):\n"
        "        try: os.write(fd, word)\n"
        "        except OSError: pass\n"
        "os._exit(0)"
    ),
    "closed channel": "import os; os.closerange(3, 64)",
    "markers on all outputs": (
        "import os\nfor fd in (1, 2):\n    os.write(fd, b'passed\\n')\nos._exit(0)"
    ),
    "unprintable exception": (
        "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E"
    ),
    "exception that looks like a nonce": "raise Exception('x' * 16)",
}

# What must fail although the test behind it has only right answers to find wrong.
TEST = (
    "def check(candidate):\n    answer = candidate(1)\n    assert answer == 2\n    x = 1\ncheck(f)"
)
CHEATS = {
    "own check": "def f(x): return 0\ndef check(candidate): pass",
    "decorator reaches for check": "def f(x): return 0\n@lambda _: (lambda candidate: None)",
    "open bracket": "def f(x): return 0\n(",
    "open string": 'def f(x): return 0\n"""',
    "backslash": "def f(x): return 0\nif False: \\",
    "exec does nothing": "import builtins\nbuiltins.exec = lambda *a: None\ndef f(x): return 0",
    "compile does nothing": "import builtins\nbuiltins.compile = str\ndef f(x): return 0",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = int\ndef f(x): return 0",
    "leaves by exception": "def f(x): raise SystemExit(0)",
    "leaves in the call": "import os\ndef f(x): os._exit(0)",
    "frames": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "            if isinstance(value, bytes) and len(value) == 16:\n"
        "                import os; os.write(3, value); os._exit(0)\n"
        "        for name in list(frame.f_globals):\n"
        "            if 'run' in name or 'guard' in name: frame.f_globals[name] = lambda *a: None\n"
        "        frame = frame.f_back\n"
    ),
    "stack through gc": (
        "import gc, os, sys\n"
        "def f(x):\n"
        "    seen, todo = set(), [sys._getframe()]\n"
        "    while todo:\n"
        "        thing = todo.pop()\n"
        "        if isinstance(thing, bytes) and len(thing) == 16:\n"
        "            os.write(3, thing); os._exit(0)\n"
        "        if id(thing) not in seen:\n"
        "            seen.add(id(thing)); todo += gc.get_referents(thing)\n"
    ),
    "all objects": (
        "import gc, os\n"
        "def f(x):\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, (list, tuple)):\n"
        "            for part in thing:\n"
        "                if isinstance(part, bytes) and len(part) == 16:\n"
        "                    os.write(3, part); os._exit(0)\n"
    ),
    "trace function": (
        "import sys\n"
        "def trace(frame, event, arg):\n"
        "    frame.f_globals['check'] = lambda c: None\n"
        "    return trace\n"
        "sys.settrace(trace)\ndef f(x): return 0"
    ),
    "trace function that jumps": (
        "import sys\n"
        "def jump(frame, event, arg):\n"
        "    frame.f_lineno = frame.f_code.co_firstlineno + 3\n"
        "def f(x):\n"
        "    sys._getframe(1).f_trace = jump\n"
        "    sys.settrace(lambda *a: None)\n"
        "    return 0"
    ),
    "trace function that outlives the end of tracing": (
        "import sys\n"
        "done = []\n"
        "def jump(frame, event, arg):\n"
        "    if event == 'line' and frame.f_code.co_name == 'check' and frame.f_lineno < 4:\n"
        "        frame.f_lineno = 4\n"
        "    return jump\n"
        "def profile(frame, event, arg):\n"
        "    if event == 'c_return' and arg is sys.settrace and not done:\n"
        "        done.append(1)\n"
        "        sys.settrace(jump)\n"
        "        sys.setprofile(None)\n"
        "def between_stages(frame, event, arg):\n"
        "    if event == 'opcode' and not done: sys.setprofile(profile)\n"
        "    return between_stages\n"
        "caller = sys._getframe(1)\n"
        "caller.f_trace_opcodes, caller.f_trace = True, between_stages\n"
        "sys.settrace(between_stages)\n"
        "def f(x): return 0"
    ),
    "thread that waits for check": (
        "import threading\n"
        "def wait():\n"
        "    while True: globals()['check'] = lambda c: None\n"
        "threading.Thread(target=wait, daemon=True).start()\ndef f(x): return 0"
    ),
    "timer that waits for check": (
        "import signal\n"
        "def late(*_): globals()['check'] = lambda c: None\n"
        "signal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, .001, .0001)\n"
        "def f(x): return 0"
    ),
    "callback of gc": (
        "import gc\n"
        "gc.set_threshold(1)\n"
        "gc.callbacks.append(lambda *a: globals().update(check=lambda c: None))\n"
        "def f(x): return 0"
    ),
    "own memory": (
        "def f(x):\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    memory = open('/proc/self/mem', 'rb+')\n"
        "    raise Exception(maps)"
    ),
}
PATCHES = {
    "abs": "import builtins\nbuiltins.abs = lambda x: 0",
    "math": "import math\nmath.fabs = lambda x: 0",
    "module": (
        "import sys, types\n"
        "m = types.ModuleType('math'); m.fabs = lambda x: 0\n"
        "sys.modules['math'] = m"
    ),
    "builtins of the namespace": "__builtins__ = {'abs': lambda x: 0, '__import__': __import__}",
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("isolate", [True, False], ids=["namespaces", "limits"])
def test_fakes_fail(isolate: bool) -> None:
    verdicts = run_programs(list(FAKES.values()), isolate=isolate)
    wrong = ("failed", "refused")
    assert {k: v for k, v in zip(FAKES, verdicts, strict=True) if v.outcome not in wrong} == {}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("isolate", [True, False], ids=["namespaces", "limits"])
def test_cheats_on_a_test_fail(isolate: bool, together: bool) -> None:
    honest = Program("def f(x): return 2", TEST, together=together)
    programs = [Program(code, TEST, together=together) for code in CHEATS.values()]
    verdicts = run_programs([*programs, honest], isolate=isolate)
    assert {verdict.together for verdict in verdicts} == {together}
    assert verdicts.pop().passed, "the honest one must pass, or the test proves nothing"
    assert {k: v for k, v in zip(CHEATS, verdicts, strict=True) if v.passed} == {}


def test_replaced_helpers_of_a_test_fail() -> None:
    test = "import math\nassert abs(f(1) - 2) < 1e-6 and math.fabs(f(1) - 2) < 1e-6"
    when_defined = [Program(f"{p}\ndef f(x): return 9", test) for p in PATCHES.values()]
    when_called = [
        Program(
            f"def f(x):\n    global __builtins__\n    {'; '.join(p.splitlines())}\n    return 9",
            test,
        )
        for name, p in PATCHES.items()
        if name != "module"
    ]
    verdicts = run_programs([*when_defined, *when_called])
    assert not any(verdict.passed for verdict in verdicts)
    assert not any(verdict.together for verdict in verdicts)
    together = [replace(program, together=True) for program in [*when_defined, *when_called]]
    verdicts = run_programs(together)
    assert not any(verdict.passed for verdict in verdicts)
    assert "replaced" in verdicts[0].detail


def test_a_builtin_replaced_for_the_length_of_a_call_does_not_reach_the_test() -> None:
    cheat = (
        "import builtins\n"
        "real = builtins.abs\n"
        "def lie(x):\n"
        "    builtins.abs = real\n"
        "    return 0\n"
        "def f(x):\n"
        "    builtins.abs = lie\n"
        "    return 9"
    )
    (verdict,) = run_programs([Program(cheat, "assert abs(f(1) - 2) < 1e-6")])
    assert not verdict.passed


def test_doctest_may_trace_while_the_program_is_defined() -> None:
    code = "import doctest\ndef f(x):\n    return x + 1\ndoctest.testmod()"
    (verdict,) = run_programs([Program(code, TEST)])
    assert verdict.passed, verdict.detail
