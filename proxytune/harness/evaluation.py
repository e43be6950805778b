"""One lm-eval task, group or tag on one of our generators, from Python."""

import difflib
import logging
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from proxytune.api import Generator
from proxytune.errors import UserError
from proxytune.harness.model import ProxyTuneLM

OWN_TASKS = str(Path(__file__).parent / "tasks")
# SymPy's LaTeX parser takes this release of antlr4-python3-runtime alone, Hydra another one.
_LATEX_ANTLR = "4.11"
_HAS_ANTLR = version("antlr4-python3-runtime").rpartition(".")[0]

# words of the reason -> what helps
_OTHER_WAY = (
    "choose another task, or copy its file to a folder of your own (include_path) and set"
    " its dataset_path to a copy of the data"
)
_ONLINE = "load it once while the hub can be reached, and its copy is used from then on"
_WAYS_OUT = (
    (("module script",), _ONLINE),  # a metric of the package evaluate
    (
        ("script", "trust_remote_code", "custom code"),
        f"datasets runs no script of a dataset: {_OTHER_WAY}",
    ),
    (
        ("gated", "401", "403", "authenticat"),
        "ask for access on its page of the hub, then log in: hf auth login",
    ),
    (
        ("offline", "reach", "connect", "resolve", "timed out"),
        _ONLINE,
    ),
)


def check_task(name: str, include_path: str | None = None, *, run_code: bool = False) -> None:
    """Makes sure that a task, group or tag can be run, by loading its documents.

    Args:
        name: as in `lm_eval --tasks`.
        include_path: a folder of further task files.
        run_code: whether tasks may run model-written code.

    Raises:
        UserError: lm-eval does not know the task (close names are suggested), its documents
            cannot be loaded, or it would run code.
    """
    manager = _task_manager(name, include_path)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
        raise UserError(f"lm-eval has no task {name!r}; {hint}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # those of a dataset have many types, some of them RuntimeError
        refusal = no_dataset(error, name)
        if refusal is not None:
            raise UserError(refusal) from error
        if isinstance(error, ImportError | AssertionError) and "antlr4" in str(error):
            raise UserError(_no_antlr(name)) from error
        expected = isinstance(error, OSError | ImportError | ValueError)
        if expected or not _raised_below(error, OWN_TASKS, include_path):
            kind = "" if expected else f"{type(error).__name__}: "  # a KeyError is one word
            reason = kind + _first_line(error)
            ways = "".join(f"; {way}" for way in _ways_out(reason)[:1])
            raise UserError(f"lm-eval cannot load its task {name}: {reason}{ways}") from error
        raise
    if _HAS_ANTLR != _LATEX_ANTLR and any(map(_parses_latex, loaded["tasks"].values())):
        raise UserError(_no_antlr(name))
    unsafe = [n for n, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not run_code:
        raise UserError(
            f"{unsafe[0]} of lm-eval runs model-written code on this machine without a sandbox; "
            "say run_code=true (and HF_ALLOW_CODE_EVAL=1), or use our humaneval, which has one"
        )


def _no_antlr(name: str) -> str:
    """The refusal of a task that grades by SymPy's LaTeX parser."""
    return (
        f"lm-eval's task {name} grades by SymPy's LaTeX parser, which needs "
        f"antlr4-python3-runtime {_LATEX_ANTLR}, and Hydra needs {_HAS_ANTLR}; take "
        "task=lm_eval/math500_verify (pip install 'proxytune[math]'), or ask `proxytune serve` by "
        "lm-eval in an environment of its own (pip install 'lm-eval[math,api]')"
    )


def _parses_latex(task: Any) -> bool:
    """Whether a task grades by SymPy's LaTeX parser, which would fail after all was generated."""
    grade = getattr(getattr(task, "config", None), "process_results", None)
    return "parse_latex" in getattr(grade, "__globals__", {})


def _downloading(error: BaseException) -> Task | None:
    """The lm-eval task whose dataset was being loaded when the error was raised, if one was.

    A `custom_dataset` is the task author's own code, whose errors are kept as they are.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "download" and isinstance(owner, Task):
            own = callable(getattr(getattr(owner, "config", None), "custom_dataset", None))
            return None if own else owner
    return None


def no_dataset(error: BaseException, asked: str = "") -> str | None:
    """One line that names the task, the dataset, the reason and the way out.

    Args:
        error: an exception of lm-eval.
        asked: the task, group or tag that was asked for; "" where that is not known.

    Returns:
        None if the error is not that a dataset could not be loaded.
    """
    owner = _downloading(error)
    if owner is None:
        return None
    config = getattr(owner, "config", None)
    task = getattr(config, "task", None) or asked
    within = f" (of {asked})" if asked and task != asked else ""
    part = f" ({owner.DATASET_NAME})" if owner.DATASET_NAME else ""
    reason = _first_line(error)
    way = next(iter(_ways_out(reason)), _OTHER_WAY)
    return (
        f"lm-eval's task {task}{within}: its dataset {owner.DATASET_PATH}{part} cannot be loaded"
        f" ({reason}); {way}"
    )


def _ways_out(reason: str) -> list[str]:
    """What helps against a reason, by its words."""
    return [way for words, way in _WAYS_OUT if any(w in reason.lower() for w in words)]


def _raised_below(error: BaseException, *folders: str | None) -> bool:
    """Whether an error comes through code in one of the folders, whose author wants a traceback."""
    roots = [Path(folder).resolve() for folder in folders if folder is not None]
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.resolve().is_relative_to(root) for file in files for root in roots)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def conversations(
    name: str, include_path: str | None = None, num_fewshot: int | None = None
) -> list[list[dict[str, str]]]:
    """The turns in which lm-eval asks the first document of each task under a name.

    Args:
        name: of a task, group or tag.
        include_path: as for `evaluate`.
        num_fewshot: as for `evaluate`.
    """
    found: list[list[dict[str, str]]] = []

    def keep(messages: list[dict[str, str]], **_: Any) -> str:
        found.append(messages)
        return ""

    for task in _task_manager(name, include_path).load([name])["tasks"].values():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":  # whole texts, in no conversation
            continue
        task.set_fewshot_seed(seed=0)
        shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
        task.fewshot_context(
            next(iter(task.eval_docs)),
            shots or 0,
            apply_chat_template=True,
            fewshot_as_multiturn=True,  # `simple_evaluate`'s default
            chat_template=keep,
        )
    return found


def evaluate(
    generator: Generator,
    task: str,
    *,
    cache: Path,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    include_path: str | None = None,
    batch_size: int | str = "auto",
    run_code: bool = False,
) -> dict[str, Any]:
    """Runs one lm-eval task, group or tag and returns lm-eval's own results with samples.

    Args:
        generator: the system.
        task: lm-eval's name.
        cache: the file that keeps answered requests, so that a killed run can go on. Its keys do
            not name the model: every system needs a file of its own.
        num_fewshot: examples in the prompt; None is the task's own number.
        limit: number of documents, the first ones; None is all of them.
        seed: of few-shot examples and of sampled generations.
        gen_kwargs: generation settings, which replace the task's own.
        apply_chat_template: whether to ask in the members' chat formats.
        include_path: a folder of further task files.
        batch_size: rows at once.
        run_code: allows tasks that run model-written code, unguarded, on this machine.

    Raises:
        UserError: see `check_task`.
    """
    check_task(task, include_path, run_code=run_code)
    cache.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # it logs too much at INFO
    results = simple_evaluate(
        model=ProxyTuneLM(generator=generator, batch_size=batch_size, seed=seed),
        tasks=[task],
        num_fewshot=num_fewshot,
        use_cache=str(cache),
        limit=limit,
        gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
        apply_chat_template=apply_chat_template,
        task_manager=_task_manager(task, include_path),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=run_code,
        bootstrap_iters=1000,
    )
    assert results is not None
    return cast("dict[str, Any]", results)


_managers: dict[tuple[str | None, bool], TaskManager] = {}


def _task_manager(name: str, include_path: str | None) -> TaskManager:
    """The index of tasks; lm-eval's own files, whose index takes seconds, only if needed."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"include_path={include_path} is not a folder of lm-eval task files")
        own = _indexed(include_path, include_defaults=False)
        if name in own.all_subtasks:
            return own
    return _indexed(include_path, include_defaults=True)


def _indexed(include_path: str | None, include_defaults: bool) -> TaskManager:
    key = (include_path, include_defaults)
    if key not in _managers:
        paths: list[str | Path] = [OWN_TASKS, *([] if include_path is None else [include_path])]
        _managers[key] = TaskManager(include_path=paths, include_defaults=include_defaults)
    return _managers[key]
