"""DS-1000: the subset, the prompts, the tests on small rows of the dataset's shape."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from proxytune.loading.prompting import PromptFormat, render
from tasks.ds1000 import DS1000, LIBRARIES, paper_subset, program

CONTEXT = '''
import numpy as np
import copy
import tokenize, io


def generate_test_case(test_case_id):
    test_input = np.arange(test_case_id + 2)
    return test_input, copy.deepcopy(test_input).sum()


def exec_test(result, ans):
    np.testing.assert_array_equal(result, ans)
    return 1


exec_context = r"""
import numpy as np
x = test_input
[insert]
"""


def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    for i in range(2):
        test_input, expected_result = generate_test_case(i + 1)
        test_env = {"test_input": test_input}
        exec(code, test_env)
        assert exec_test(test_env["result"], expected_result)
'''
STRING_TEST = """

def test_string(solution: str):
    tokens = [t.string for t in tokenize.tokenize(io.BytesIO(solution.encode()).readline)]
    assert "for" not in tokens
"""
PLOT_CONTEXT = """
import numpy as np
import matplotlib.pyplot as plt


def test_execution(solution: str):
    env = {}
    exec("import matplotlib.pyplot as plt\\n" + solution, env)
    plt.savefig("output.png")
    assert len(plt.gca().lines) == 1
"""


def row(library: str, number: int) -> dict[str, Any]:
    return {
        "prompt": f"Problem: {library} {number}\nBEGIN SOLUTION\n<code>\n",
        "reference_code": "result = x.sum()",
        "metadata": {"library": library, "library_problem_id": number, "problem_id": 0},
        "code_context": PLOT_CONTEXT if library == "Matplotlib" else CONTEXT + STRING_TEST,
    }


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [row(library, i) for library, (n, _) in LIBRARIES.items() for i in range(n)]
    file = tmp_path / "ds1000.jsonl.gz"
    with gzip.open(file, "wt") as out:
        # in an order that is not the paper's
        out.writelines(json.dumps(r) + "\n" for r in reversed(rows))
    return str(file)


def test_the_paper_s_settings() -> None:
    decoding = DS1000().decoding
    assert decoding.stop == ("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION")
    assert decoding.banned_first == ("</",)
    assert (decoding.n, decoding.temperature, decoding.top_p) == (20, 0.8, 0.95)


def test_the_subset_by_library() -> None:
    bounds, start = {}, 0
    for library, (count, _) in LIBRARIES.items():
        bounds[library] = range(start, start + count)
        start += count
    assert start == 1000
    drawn = Counter(name for i in paper_subset() for name, span in bounds.items() if i in span)
    assert [drawn[name] for name in LIBRARIES] == [55, 41, 38, 9, 18, 23, 16]


def test_the_subset_is_the_release_s(path: str, shared: Path) -> None:
    file = shared / "published" / "ds1000" / "dexperts-13B-t0.8" / "predictions.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        released = [json.loads(line) for line in lines]
    ids = [example.id for example in DS1000(path=path).examples()]
    assert ids == [f"{r['lib']}/{r['problem_id']}" for r in released]


def test_prompts_equal_the_release(shared: Path, tmp_path: Path) -> None:
    """The dataset is not at hand: rows with the released prompts stand in, and stay as they are."""
    file = shared / "published" / "ds1000" / "dexperts-13B-t0.8" / "predictions.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        released = {(r["lib"], r["problem_id"]): r["prompt"] for r in map(json.loads, lines)}
    rows = [row(library, i) for library, (n, _) in LIBRARIES.items() for i in range(n)]
    for each in rows:
        place = each["metadata"]["library"], each["metadata"]["library_problem_id"]
        each["prompt"] = released.get(place, each["prompt"])
    path = tmp_path / "ds1000.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    for kind in ("raw", "chat"):  # chat models read this benchmark's prompts as they stand, too
        shown = [
            render(e.prompt, PromptFormat(kind), tokenizer).text
            for e in DS1000(path=str(path)).examples()
        ]
        assert shown == list(released.values())
    example = (file.parent / "example_prompt.txt").read_bytes().decode("utf-8")
    assert shown[0] == example


def test_the_whole_set_has_its_own_name(path: str) -> None:
    task = DS1000(path=path, subset=1000)
    assert (task.name, DS1000().name) == ("ds1000_full", "ds1000")
    examples = task.examples()
    assert len(examples) == 1000 and examples[0].id == "Pandas/0"
    with pytest.raises(ValueError, match="200"):
        DS1000(subset=100)


def test_a_file_that_is_not_the_whole_set_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(row("Numpy", 0)) + "\n")
    with pytest.raises(ValueError, match="lacks 999 of DS-1000's problems"):
        DS1000(path=str(file)).examples()


def test_what_a_run_needs_is_asked_before(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_code_execution=true"):
        DS1000().check()
    with pytest.raises(ValueError, match="cannot be run"):
        DS1000(allow_code_execution=True, python=str(tmp_path / "none")).check()
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"tensorflow.*task\.ds1000\.python=PATH"):
        DS1000(allow_code_execution=True, python=str(bare)).check()


@pytest.mark.slow
def test_solutions_are_run_by_the_rows_own_tests(path: str) -> None:
    task = DS1000(path=path, subset=1000, allow_code_execution=True, timeout_s=60)
    example = next(e for e in task.examples() if e.id == "Numpy/0")
    cases = {
        "result = x.sum()": True,
        "result = x.max()": False,
        "result = 0\nfor i in x: result += i": False,  # test_string forbids it
        "import sys; sys.exit(0)": False,
        "import os; os._exit(0)": False,
        "raise StopIteration": False,
        "import numpy as np\nnp.testing.assert_array_equal = print\nresult = 0": False,
        "result = '\\'\"\"\"'": False,
        "(": False,
        "": False,
    }
    verdicts = task.verdicts([example] * len(cases), list(cases))
    assert [v.passed for v in verdicts] == list(cases.values())


@pytest.mark.slow
def test_scores_count_for_their_library(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # seaborn and PIL need not be there for this
    monkeypatch.setitem(LIBRARIES, "Matplotlib", (155, ("matplotlib.pyplot",)))
    task = DS1000(path=path, allow_code_execution=True, timeout_s=60)
    examples = [e for e in task.examples() if e.id in ("Numpy/120", "Matplotlib/10")]
    texts = {
        "Numpy": ["result = x.sum()"] * 10 + ["x"] * 2,
        "Matplotlib": ["plt.plot([0, 1])"] + ["plt.bar([0], [1])"] * 11,
    }
    scores = task.score_all(examples, [texts[e.row["library"]] for e in examples])
    plot, array = scores if examples[0].row["library"] == "Matplotlib" else scores[::-1]
    assert array.values["numpy_pass@10"] == array.values["pass@10"] == 1.0
    assert array.values["pandas_pass@10"] is None and array.values["matplotlib_pass@10"] is None
    assert plot.values["pass@1"] == pytest.approx(1 / 12)
    assert plot.values["matplotlib_pass@10"] == pytest.approx(10 / 12)
    assert set(plot.values) == set(DS1000.metrics)


def test_a_solution_is_passed_as_text(path: str) -> None:
    example = DS1000(path=path).examples()[0]
    made = program(example, 'x = "\n"')
    assert made.code == "" and made.executes
    assert made.test.endswith("\ntest_execution('x = \"\\n\"')\n")
