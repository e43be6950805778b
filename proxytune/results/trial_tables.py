"""What `proxytune check` prints: costs, a table for each task, and the verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from proxytune.records import Metric, MetricInfo
from proxytune.results.tables import DASH, p_text
from proxytune.results.verdict import HURTS, Compared, best

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def remarks(
    found: Compared,
    scan: Mapping[float, Compared],
    alpha: float,
    alone: Compared | None,
    info: MetricInfo,
) -> list[str]:
    """What a verdict should not hide, in a few words each.

    Args:
        found: the triple compared with its base.
        scan: alpha -> the same at each alpha, as one of that many tests.
        alpha: the one that `found` is about.
        alone: the expert alone compared with the triple; None where there is no expert.
        info: how the metric is shown.
    """
    scale = 100 if info.percent else 1
    said = []
    other = best(scan)
    if found.word != "helps" and other is not None and other != alpha:
        change = scan[other].difference.value * scale
        said.append(f"alpha={other:g} helps ({change:+.1f}, p corrected for {len(scan)} alphas)")
    if alone is not None and alone.word == "helps":
        said.append(f"the expert alone does better ({alone.ours * scale:.1f})")
    if found.word == HURTS and alone is not None and alone.word != "helps" and alone.better:
        said.append(f"the expert alone has {alone.ours * scale:.1f}")
    return said


def show(costs: Any, trials: Sequence[Any], alpha: float | None) -> None:
    """Prints what a check has found.

    Args:
        costs: `experiment.costs.Costs`.
        trials: `experiment.trial.TaskTrial`, one for each task.
        alpha: the one that is asked about; None where the formula has none.
    """
    console = Console(soft_wrap=True)
    console.print()
    for line in cost_lines(costs):
        console.print(line, highlight=False, markup=False)
    for trial in trials:
        console.print(task_table(trial, alpha))
        for line in drafting_lines(costs, trial, alpha):
            console.print(line, highlight=False, markup=False)
    for trial in trials:
        console.print(f"\n{trial.verdict}", highlight=False, markup=False)


def cost_lines(costs: Any) -> list[str]:
    """Vocabulary, memory and time, a line each."""
    weights = ", ".join(f"{role} {_bytes(each)}" for role, each in costs.weights.items())
    lines = [
        f"vocabulary: {costs.vocab_size:,} tokens are shared by {', '.join(costs.weights)}",
        f"memory: weights {_bytes(sum(costs.weights.values()))} ({weights}), caches "
        f"{_bytes(costs.cache_per_token)} per token; {costs.rows} rows of {costs.longest:,} tokens "
        f"take {_bytes(costs.rows * costs.longest * costs.cache_per_token)}",
    ]
    if costs.peak is not None:
        lines.append(f"GPU memory in use at most: {_bytes(costs.peak)}")
    for step in costs.steps:
        ratio = step.lockstep / step.base
        lines.append(
            f"seconds per token, {step.rows} row{'' if step.rows == 1 else 's'} at once: "
            f"base {step.base:.4f}, triple {step.lockstep:.4f} ({ratio:.1f} times)"
        )
    if not costs.steps:
        lines.append("seconds per token: not measured, for the base runs on a server")
    return lines


def drafting_lines(costs: Any, trial: Any, alpha: float | None) -> list[str]:
    """What drafting gains on a task, a line for each number of rows."""
    found = trial.confirmed[alpha if alpha is not None else next(iter(trial.confirmed))]
    if found is None:
        return []
    lines = []
    for step in costs.steps:
        width, gain = step.gain(found)
        rows = f"{step.rows} row{'' if step.rows == 1 else 's'} at once"
        what = f"blocks of {width} promise {gain:.1f} times the speed of lockstep"
        lines.append(f"drafting, {rows}: {what if width > 1 else 'gains nothing over lockstep'}")
    return lines


def task_table(trial: Any, alpha: float | None) -> Table:
    """Every system on one task."""
    any_compared = next(iter(trial.alphas.values()))
    scale = 100 if trial.info.percent else 1
    of = "" if trial.available is None else f" of {trial.available:,}"
    arrow = "" if trial.info.higher_is_better else " ↓"
    table = Table(
        title=f"{trial.task}{arrow}, {trial.info.label}, {any_compared.n}{of} examples",
        caption="95 % intervals below the values; differences are paired, on the same examples",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("", "minus base", "p", "tokens\nchanged", "drafts\nconfirmed"):
        table.add_column(name, justify="right", no_wrap=True)
    for system, metric in trial.systems.items():
        table.add_row(system, _value(metric, scale), "", "", "", "")
    for each, compared in trial.alphas.items():
        name = "triple" if alpha is None else f"alpha={each:g}"
        shares = [_share(trial.changed[each]), _share(trial.confirmed[each])]
        change = _change(compared, scale)
        p = p_text(compared.difference.p_value)
        style = "bold" if each == alpha and len(trial.alphas) > 1 else None
        table.add_row(name, _value(trial.metrics[each], scale), change, p, *shares, style=style)
    if trial.gain is not None:
        p = p_text(trial.gain.difference.p_value)
        table.add_row("expert minus\nantiexpert", "", _change(trial.gain, scale), p, "", "")
    return table


def _value(metric: Metric | None, scale: float) -> str:
    if metric is None:
        return DASH
    text = f"{metric.value * scale:.1f}"
    if metric.ci_low is None or metric.ci_high is None:
        return text
    return f"{text}\n{metric.ci_low * scale:.1f}–{metric.ci_high * scale:.1f}"


def _change(found: Compared, scale: float) -> str:
    low, high = found.difference.low * scale, found.difference.high * scale
    between = f"\n{low:+.1f} to {high:+.1f}" if low == low else ""  # a single example has none
    return f"{found.difference.value * scale:+.1f}{between}"


def _share(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"


def _bytes(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), (1, "bytes"))
    return f"{count / unit:.1f} {name}" if name != "bytes" else f"{count:.0f} bytes"
