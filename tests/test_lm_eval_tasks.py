"""Tasks of lm-eval in an experiment: their records, their mistakes, and what they need."""

import sys
from pathlib import Path

import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from lm_eval.tasks import TaskManager

from proxytune import api
from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.harness import __main__ as harness_command
from proxytune.harness import evaluation
from tasks.lm_eval_task import LmEvalTask
from tests.api_triple import in_process

pytestmark = pytest.mark.usefixtures("quick_lm_eval")
ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tests" / "lm_eval_tasks"


@pytest.fixture(scope="module")
def triple(folder) -> api.Generator:
    return in_process(folder, 0.7)


def test_a_task_gives_our_records_with_lm_evals_numbers(triple, tmp_path):
    task = LmEvalTask("tiny_choice", include_path=str(TASKS))
    task.check()
    result = task.run(triple, tmp_path, "proxy")
    own = evaluation.evaluate(
        triple, "tiny_choice", cache=tmp_path / "again", include_path=str(TASKS)
    )["results"]["tiny_choice"]
    found = {m.metric: m for m in result.metrics}
    assert found["acc"].value == own["acc,none"] and found["acc"].n == 4
    assert found["acc"].stderr == own["acc_stderr,none"]
    assert {m.system for m in result.metrics} == {"proxy"}
    assert sum(s.values["acc"] or 0 for s in result.scores) / 4 == found["acc"].value
    assert result.infos["acc"].percent and result.infos["acc"].higher_is_better
    first = result.scores[0]
    assert first.target == "0" and first.answer in (" Paris", " April", " 42")
    assert (first.answer == " Paris") == bool(first.values["acc"])
    assert all((m.ci_low or 0) >= 0 and (m.ci_high or 0) <= 1 for m in result.metrics)
    assert task.finished(tmp_path, None) and not task.finished(tmp_path, 2)
    assert task.result(tmp_path) == result
    with pytest.raises(ValueError, match="stage=all"):
        task.result(tmp_path / "empty")


def test_a_perplexity_is_no_share_and_no_mean(triple, tmp_path):
    result = LmEvalTask("tiny_perplexity", include_path=str(TASKS)).run(triple, tmp_path, "base")
    assert {m.metric for m in result.metrics} == {"word_perplexity", "bits_per_byte"}
    info = result.infos["word_perplexity"]
    assert not info.percent and not info.higher_is_better
    assert not result.scores


def test_a_killed_run_goes_on(triple, tmp_path, monkeypatch):
    task = LmEvalTask("tiny_choice", include_path=str(TASKS))
    monkeypatch.setattr("proxytune.harness.model._BLOCK", 4)
    real, calls = triple.loglikelihood, []

    def dies(pairs, **settings):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(pairs, **settings)

    monkeypatch.setattr(triple, "loglikelihood", dies)
    with pytest.raises(KeyboardInterrupt):
        task.run(triple, tmp_path, "proxy")
    task.run(triple, tmp_path, "proxy")
    assert calls == [4, 4, 4, 4]  # twelve requests; eight were kept


def test_an_unknown_task_is_refused_with_close_names(monkeypatch):
    own = TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(evaluation, "_task_manager", lambda *_: own)
    with pytest.raises(ValueError, match=r"no task 'tiny_chioce'; did you mean tiny_choice"):
        LmEvalTask("tiny_chioce").check()


def task_file(folder: Path, dataset: str, **settings: str) -> str:
    """A folder with one task of lm-eval on a dataset, in a group of its own."""
    lines = {"task": "strange", "dataset_path": dataset, "test_split": "test"} | settings
    lines |= {"output_type": "loglikelihood", "doc_to_text": "q", "doc_to_target": "a"}
    folder.mkdir()
    (folder / "strange.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    (folder / "all.yaml").write_text("group: strangers\ntask: [strange]\n")
    return str(folder)


@pytest.mark.parametrize(
    ("named", "asked"),
    [
        ("folder", "strange"),
        ("file", "strange"),
        pytest.param("folder", "strangers", marks=pytest.mark.slow),
    ],
)
def test_a_dataset_that_is_a_script_is_refused_in_one_line(tmp_path, asked, named):
    """Fails on 538a493 with datasets' RuntimeError and its traceback."""
    script = tmp_path / "old" / "old.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('run')\n")
    dataset = str(script if named == "file" else script.parent)
    folder = task_file(tmp_path / "tasks", dataset, dataset_name="main")
    with pytest.raises(UserError, match=r"scripts are no longer supported.*include_path") as said:
        LmEvalTask(asked, include_path=folder).check()
    text = str(said.value)
    assert text.startswith("lm-eval's task strange") and f"its dataset {dataset} (main)" in text
    assert ("(of strangers)" in text) == (asked == "strangers") and "\n" not in text


@pytest.mark.slow
def test_math_tasks_say_what_they_need_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # not installed
    with pytest.raises(UserError, match=r"math500_verify.*pip install 'proxytune\[math\]'") as told:
        evaluation.check_task("math500_verify", str(TASKS))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"antlr4-python3-runtime 4\.11, and Hydra needs 4\.9"):
        evaluation.check_task("minerva_math500")


def test_a_grader_of_latex_is_found_without_running_it():
    """lm-eval's leaderboard_math loads without its parser, and fails after all was generated."""
    from types import FunctionType, SimpleNamespace

    def grade():
        return {}

    latex = FunctionType(grade.__code__, {"parse_latex": None})
    tasks = [SimpleNamespace(config=SimpleNamespace(process_results=f)) for f in (latex, grade)]
    assert [evaluation._parses_latex(task) for task in tasks] == [True, False]


@pytest.mark.slow
def test_math500_is_graded_by_math_verify():
    pytest.importorskip("math_verify", reason="pip install 'proxytune[math]'")
    from proxytune.harness.tasks.grading import process_results

    doc = {"solution": "So it is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$"}
    right = "Let me see. The answer is \\boxed{(3, \\pi/2)}."
    assert process_results(doc, [right]) == {"math_verify": 1}
    for wrong in ("\\boxed{(3, \\pi/3)}", "It is three.", ""):
        assert process_results(doc, [wrong]) == {"math_verify": 0}


@pytest.mark.slow
def test_lm_evals_own_command_says_it_in_one_line_too(tmp_path, folder, monkeypatch, capsys):
    """Fails on 538a493 with datasets' RuntimeError and its traceback."""
    script = tmp_path / "old" / "old.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('run')\n")
    tasks = task_file(tmp_path / "tasks", str(script.parent), dataset_name="main")
    base = f"base={folder / 'base'}"
    command = ["run", "--model", "proxytune", "--model_args", base, "--tasks", "strange"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *command, "--include_path", tasks])
    with pytest.raises(SystemExit) as ended:
        guarded(harness_command.main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert (
        last.startswith("error: lm-eval's task strange: its dataset") and "scripts are no" in last
    )


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "hf auth login"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "choose another task"),
        (ValueError("a/b contains custom code: pass trust_remote_code=True\nmore"), "no script"),
        (OfflineModeIsEnabled("Cannot reach a/b: offline mode is enabled."), "once while the hub"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "no script"),
        (KeyError("test"), "choose another task"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_refused_in_one_line(tmp_path, monkeypatch, error, way_out):
    """The last two fail on 538a493; the others name no dataset there."""
    folder = task_file(tmp_path / "tasks", "a/b")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(UserError, match=rf"task strange: its dataset a/b .*{way_out}") as said:
        LmEvalTask("strange", include_path=folder).check()
    assert "\n" not in str(said.value)


def test_a_fault_of_lm_evals_own_code_is_one_line(tmp_path, monkeypatch):
    """Its careqa_open raises RuntimeError while its file is imported without a network."""
    folder = task_file(tmp_path / "tasks", "a/b")

    def load(*_: object) -> None:
        raise RuntimeError("Couldn't find a module script at bleu.py.\nmore")

    monkeypatch.setattr(TaskManager, "load", load)
    with pytest.raises(
        UserError, match=r"task strange: RuntimeError: Couldn't find .*once while the hub"
    ) as said:
        LmEvalTask("strange", include_path=folder).check()
    assert "\n" not in str(said.value)


def test_a_fault_in_a_tasks_own_code_keeps_its_traceback(tmp_path):
    folder = Path(task_file(tmp_path / "tasks", "a/b", custom_dataset="!function own.load"))
    (folder / "own.py").write_text("def load(**_):\n    return {}[0]\n")
    with pytest.raises(KeyError):
        LmEvalTask("strange", include_path=str(folder)).check()


def test_generating_alone_checks_another_harness_first(tmp_path, monkeypatch, capsys):
    """On 538a493 `stage=generate` looked at lm-eval's task after the models had loaded."""
    from proxytune import cli

    settings = ["experiment=none", "triple=pocket", "name=x", "stage=generate"]
    words = [*settings, "task=lm_eval/tiny_chioce", f"output_dir={tmp_path}"]
    own = TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(evaluation, "_task_manager", lambda *_: own)
    monkeypatch.setattr("proxytune.experiment.checks.check_models", lambda _: pytest.fail("late"))
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit):
        cli.run()
    assert "did you mean tiny_choice" in capsys.readouterr().err


def test_any_task_composes_without_a_file():
    from hydra import compose, initialize_config_dir

    from proxytune.config.schema import register, to_dict

    register()

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "experiment=none",
                "task=[lm_eval/arc_easy,gsm8k]",
                "task.lm_eval_arc_easy.num_fewshot=5",
            ],
        )
    tasks = to_dict(cfg.task)
    assert list(tasks) == ["lm_eval_arc_easy", "gsm8k"]
    assert tasks["lm_eval_arc_easy"]["task"] == "arc_easy"
    assert tasks["lm_eval_arc_easy"]["num_fewshot"] == 5
