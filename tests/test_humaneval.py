"""HumanEval: prompts, the estimator, the rule, the release's verdicts, the opt-in."""

import gzip
import json
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxytune.records import Example
from tasks.humaneval import HumanEval, clean, pass_at_k, program
from tasks.sandbox import Sandbox

PROBLEMS = [
    {
        "task_id": "T/0",
        "prompt": 'def double(x: int) -> int:\n    """ Twice x. """\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
    },
    {
        "task_id": "T/1",
        "prompt": "def half(x: int) -> int:\n",
        "entry_point": "half",
        "canonical_solution": "    return x // 2",
        "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(4) == 2\n",
    },
]


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return HumanEval(path=str(path), allow_code_execution=True)


@pytest.fixture
def real(shared: Path) -> HumanEval:
    path = shared / "data" / "humaneval" / "HumanEval.jsonl.gz"
    return HumanEval(path=str(path), allow_code_execution=True)


def release(shared: Path, system: str, name: str) -> list[dict[str, Any]]:
    path = shared / "published" / "codex_humaneval" / system / name
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_paper_s_settings() -> None:
    decoding = HumanEval().decoding
    assert (decoding.n, decoding.temperature, decoding.top_p) == (20, 0.8, 0.95)
    assert decoding.max_new_tokens == 512
    assert decoding.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert decoding.banned == ("pass", "...")


def test_code_runs_only_with_the_opt_in(task: HumanEval) -> None:
    refusing = HumanEval(name="pocket_humaneval", path=task.path)
    for attempt in (
        refusing.check,
        lambda: refusing.score(task.examples()[0], ["    return 4"]),
        lambda: refusing.verdicts([], []),
    ):
        with pytest.raises(ValueError, match=r"task\.pocket_humaneval\.allow_code_execution=true"):
            attempt()
    task.check()


def test_examples_are_the_prompts_as_they_stand(task: HumanEval) -> None:
    example = task.examples()[0]
    assert example.id == "T/0"
    assert example.prompt.raw == example.prompt.user == PROBLEMS[0]["prompt"]
    assert example.prompt.system is None and example.prompt.response_prefix == ""


def test_prompts_equal_the_release(real: HumanEval, shared: Path) -> None:
    prompts = {example.id: example.prompt.raw for example in real.examples()}
    assert len(prompts) == 164
    for folder in (shared / "published" / "codex_humaneval").iterdir():
        rows = release(shared, folder.name, "predictions.jsonl.gz")
        assert all(prompts[row["task_id"]] == row["prompt"] for row in rows)
        shown = (folder / "example_prompt.txt").read_text()
        assert shown.rstrip("\n") == prompts[rows[0]["task_id"]].rstrip("\n")


def test_scores_of_right_and_wrong_samples(task: HumanEval) -> None:
    right, wrong = "    return 2 * x", "    return x"
    texts = [[right] * 3 + [wrong] * 17, [wrong] * 20]
    first, second = task.score_all(task.examples(), texts)
    assert first.values["pass@1"] == pytest.approx(3 / 20, abs=1e-12)
    assert first.values["pass@10"] == pytest.approx(1 - comb(17, 10) / comb(20, 10), abs=1e-12)
    own = {"human_eval_pass@10": 0.0, "human_eval_pass@1": 0.0}
    sandbox = {"refused": 0.0, "together": 0.0}
    assert second.values == {"pass@10": 0.0, "pass@1": 0.0, **own, **sandbox}
    assert first.explanation.startswith("3 of 20 pass; first failure: failed, AssertionError")


def test_fewer_samples_than_k_have_no_pass_at_k(task: HumanEval) -> None:
    score = task.score(task.examples()[1], ["    return x // 2"])
    own = {"human_eval_pass@10": None, "human_eval_pass@1": 1.0}
    sandbox = {"refused": 0.0, "together": 0.0}
    assert score.values == {"pass@10": None, "pass@1": 1.0, **own, **sandbox}


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("text", "paper", "own"),
    [
        ("    printed = 2 * x\n    return printed", 0, 1),  # issue 13: the filter takes a line
        ("    assertion = 2\n    return assertion * x", 0, 1),
        ("    print(x)\n    return 2 * x", 1, 1),
        ("    return 2 * x\n    assert (", 1, 0),
        ("    return 2 * x\n\n ", 1, 1),
        ("    return 2 * x\u00a0", 1, 0),
    ],
)
def test_human_evals_own_rule_has_its_own_name(
    task: HumanEval, text: str, paper: int, own: int
) -> None:
    """Fails on 538a493, which has the paper's rule alone."""
    values = task.score(task.examples()[0], [text]).values
    assert (values["pass@1"], values["human_eval_pass@1"]) == (paper, own)


def test_a_program_that_the_filter_leaves_alone_runs_once(task: HumanEval, monkeypatch) -> None:
    ran: list[str] = []
    verdicts = HumanEval.verdicts

    def counted(self, rows, completions):
        ran.extend(completions)
        return verdicts(self, rows, completions)

    monkeypatch.setattr(HumanEval, "verdicts", counted)
    task.score(task.examples()[0], ["    return 2 * x\n", "    print(x)\n    return 2 * x"])
    assert len(ran) == 3


def test_refused_samples_are_counted_beside_the_wrong_ones(task: HumanEval) -> None:
    """Fails on 538a493: they are among the wrong ones."""
    refused = "    import os\n    return os.fork()"
    score = task.score(task.examples()[1], [refused, "    return x // 2", "    return x"])
    assert score.values["pass@1"] == pytest.approx(1 / 3)
    assert score.values["refused"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("n", [1, 2, 10, 20])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            exact = 1 - comb(n - correct, k) / comb(n, k)
            assert pass_at_k(n, correct, k) == pytest.approx(exact, abs=1e-12)
    assert pass_at_k(n, 0, n + 1) is None


def test_lines_that_print_or_assert_go() -> None:
    text = "    x = 1\n    print(x)\n    assert x\n    y = 'print'\nprint(y)\n    return x  \n\n"
    assert clean(text) == "    x = 1\n    y = 'print'\n    return x"


def test_cleaning_leaves_the_release_as_it_is(shared: Path) -> None:
    for folder in (shared / "published" / "codex_humaneval").iterdir():
        for row in release(shared, folder.name, "predictions.jsonl.gz"):
            assert clean(row["completion"]) == row["completion"]


def test_the_program_is_the_published_rule() -> None:
    made = program(PROBLEMS[0], "    return 2 * x\n")
    whole = made.code + "\n" + made.test
    row = PROBLEMS[0]
    assert whole == f"{row['prompt']}    return 2 * x\n\n{row['test']}\ncheck(double)"


@pytest.mark.slow
def test_canonical_solutions_pass(real: HumanEval) -> None:
    examples = real.examples()
    verdicts = real.verdicts([e.row for e in examples], [str(e.target) for e in examples])
    assert [e.id for e, v in zip(examples, verdicts, strict=True) if not v.passed] == []


@pytest.mark.slow
def test_some_verdicts_of_the_release(real: HumanEval, shared: Path) -> None:
    """Every 80th sample of each system; `-m slow` compares all of them."""
    rows = {example.id: example.row for example in real.examples()}
    samples = [
        sample
        for folder in sorted((shared / "published" / "codex_humaneval").iterdir())
        for sample in release(shared, folder.name, "predictions_results.jsonl.gz")[::80]
        if sample["result"] != "timed out"
    ]
    verdicts = real.verdicts(
        [rows[s["task_id"]] for s in samples], [s["completion"] for s in samples]
    )
    assert [v.passed for v in verdicts] == [s["passed"] for s in samples]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("system", ["codellama-7B", "codellama-13B", "dexperts-13B", "llama2-13B"])
def test_all_verdicts_of_the_release(real: HumanEval, shared: Path, system: str) -> None:
    examples = real.examples()
    folder = f"{system}-t0.8"
    samples = release(shared, folder, "predictions_results.jsonl.gz")
    by_id = {e.id: [s for s in samples if s["task_id"] == e.id] for e in examples}
    verdicts = real.verdicts(
        [e.row for e in examples for _ in by_id[e.id]],
        [s["completion"] for e in examples for s in by_id[e.id]],
    )
    published = [s["passed"] for e in examples for s in by_id[e.id]]
    assert [v.passed for v in verdicts] == published
    rest = iter(verdicts)
    passes = [[next(rest).passed for _ in by_id[e.id]] for e in examples]
    value = sum(pass_at_k(len(p), sum(p), 10) or 0.0 for p in passes) / len(passes)
    metrics = shared / "published" / "codex_humaneval" / folder / "metrics.json"
    assert value == pytest.approx(json.loads(metrics.read_text())["pass@10"], abs=1e-12)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text() | st.sampled_from(["\ud800", "\0", "(" * 9999]), min_size=20, max_size=60)
)
def test_no_completion_breaks_the_scorer(texts: list[str]) -> None:
    row = {key: PROBLEMS[0][key] for key in ("prompt", "test", "entry_point")}
    example = Example("T/0", prompt=None, row=row)  # pyright: ignore[reportArgumentType]
    task = HumanEval(allow_code_execution=True, workers=1)
    score = task.score(example, texts)
    assert score.values["pass@1"] == 0.0


def test_the_headline_stands_first_and_an_unknown_one_is_refused():
    """Fails on 538a493: pass@10 was every HumanEval's headline."""
    assert next(iter(HumanEval().metrics)) == "pass@10"
    for headline in ("pass@1", "human_eval_pass@1"):
        task = HumanEval(name="mine", headline=headline)
        assert next(iter(task.metrics)) == headline
        assert set(task.metrics) == set(HumanEval.metrics)
    for wrong in ("pass@5", "", "Pass@1"):
        with pytest.raises(ValueError, match=r"task\.mine\.headline=.* is none of pass@10, pass@1"):
            HumanEval(name="mine", headline=wrong)


def test_the_same_program_runs_once_unless_chance_decides_it(
    task: HumanEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = Sandbox.run

    def counted(self: Sandbox, programs: Any) -> Any:
        ran.extend(each.code for each in programs)
        return run(self, programs)

    monkeypatch.setattr(Sandbox, "run", counted)
    right, wrong, drawn = "    return 2 * x", "    return x", "    import random; return 2 * x"
    rows = [PROBLEMS[0]] * 7 + [PROBLEMS[1]]
    texts = [right, wrong, right, drawn, right, drawn, wrong, wrong]
    verdicts = task.verdicts(rows, texts)
    assert [v.passed for v in verdicts] == [True, False, True, True, True, True, False, False]
    assert sorted(ran) == sorted(
        [PROBLEMS[0]["prompt"] + text for text in (right, wrong, drawn, drawn)]
        + [PROBLEMS[1]["prompt"] + wrong]
    )
