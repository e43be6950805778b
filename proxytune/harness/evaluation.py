"""One lm-eval task, group or tag on one of our generators, from Python."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from proxytune.api import Generator
from proxytune.errors import UserError
from proxytune.harness.model import ProxyTuneLM


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
    except (OSError, ImportError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"lm-eval cannot load its task {name}: {reason}") from error
    unsafe = [n for n, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not run_code:
        raise UserError(
            f"{unsafe[0]} of lm-eval runs model-written code on this machine without a sandbox; "
            "say run_code=true (and HF_ALLOW_CODE_EVAL=1), or use our humaneval, which has one"
        )


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
        _managers[key] = TaskManager(include_path=include_path, include_defaults=include_defaults)
    return _managers[key]
