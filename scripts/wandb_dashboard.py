"""Builds the project's W&B workspace and report: bars, alpha curve, throughput, sample tables.

    python scripts/wandb_dashboard.py --entity ME                  show what would be saved
    python scripts/wandb_dashboard.py --entity ME --save           save both (needs `wandb login`)
    python scripts/wandb_dashboard.py --entity ME --metric gsm8k/acc --metric triviaqa/em

The panels read what `tracking=wandb` logs: task/system/metric, throughput/system/task/..., and the
tables "comparison" and "completions".
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.experiment.tracking import logged_in
from proxytune.results import paper
from proxytune.roles import COMPARED

_WIDTH = 24  # columns of W&B's panel grid


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line; shows or saves the workspace and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--entity", required=True, help="a W&B user or team")
    parser.add_argument("--project", default="proxytune")
    parser.add_argument("--metric", action="append", help="task/metric; default: the paper's")
    parser.add_argument("--save", action="store_true", help="write it to W&B; needs a login")
    options = parser.parse_args(arguments)
    metrics = options.metric or [f"{task}/{metric}" for task, metric in paper.KEYS]
    for metric in metrics:
        if "/" not in metric:
            raise UserError(f"--metric {metric}: give task/metric, as in gsm8k/acc")
    if not options.save:
        print(json.dumps(specification(options.entity, options.project, metrics), indent=1))
        print("nothing was saved; --save writes it to W&B (log in first: `wandb login`)")
        return
    if not logged_in():
        raise UserError("saving needs a W&B login: run `wandb login`, or set WANDB_API_KEY")
    saved = workspace(options.entity, options.project, metrics).save()
    print(f"workspace: {saved.url}")
    made = report(options.entity, options.project, metrics)
    made.save()
    print(f"report: {made.url}")


def workspace(entity: str, project: str, metrics: Sequence[str]) -> ws.Workspace:
    """The project's workspace: one section per view.

    Args:
        entity, project: whose workspace it is.
        metrics: "task/metric" names.
    """
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Proxy-tuning",
        sections=[
            ws.Section(name="Comparison", panels=bars(metrics), is_open=True),
            ws.Section(name="Alpha", panels=alpha_curves(metrics)),
            ws.Section(name="Throughput", panels=throughput(_tasks(metrics))),
            ws.Section(name="Tables", panels=sample_tables(), is_open=True),
        ],
    )


def report(entity: str, project: str, metrics: Sequence[str]) -> wr.Report:
    """The report: the workspace's panels over the project's runs, with a few words to each.

    Args:
        entity, project: whose report it is, and whose runs it shows.
        metrics: "task/metric" names.
    """

    def grid(panels: list[Any], groupby: list[str] | None = None) -> wr.PanelGrid:
        # a run set without a project is the report's own, and needs no look-up to build
        runs = wr.Runset(name="runs", groupby=groupby or [])
        return wr.PanelGrid(runsets=[runs], panels=panels)

    return wr.Report(
        entity=entity,
        project=project,
        title="Proxy-tuning",
        description="Base, expert, proxy-tuned and directly tuned, side by side.",
        width="fluid",
        blocks=[
            wr.H1("Comparison"),
            wr.P("Each system's metrics; runs of one experiment are grouped."),
            grid(bars(metrics), ["run.group"]),
            wr.H1("Alpha"),
            wr.P("The proxy's metrics over alpha, one point per run."),
            grid(alpha_curves(metrics)),
            wr.H1("Throughput"),
            grid(throughput(_tasks(metrics))),
            wr.H1("Tables"),
            wr.P("The comparison with intervals, and sample completions side by side."),
            grid(sample_tables()),
        ],
    )


def bars(metrics: Sequence[str]) -> list[Any]:
    """One bar chart per metric with a bar per system."""
    return [
        wr.BarPlot(
            title=name,
            metrics=[_key(name, system) for system in COMPARED],
            title_x="share",
            layout=_place(index),
        )
        for index, name in enumerate(metrics)
    ]


def alpha_curves(metrics: Sequence[str]) -> list[Any]:
    """One scatter plot per metric: the proxy's value over alpha."""
    return [
        wr.ScatterPlot(
            title=f"{name} over alpha",
            x=wr.Config("alpha"),
            y=wr.SummaryMetric(_key(name, "proxy")),
            layout=_place(index),
        )
        for index, name in enumerate(metrics)
    ]


def throughput(tasks: Sequence[str]) -> list[Any]:
    """One bar chart per task: tokens per second of each system."""
    return [
        wr.BarPlot(
            title=f"{task}: tokens per second",
            metrics=[f"throughput/{system}/{task}/tokens_per_second" for system in COMPARED],
            layout=_place(index),
        )
        for index, task in enumerate(tasks)
    ]


def sample_tables() -> list[Any]:
    """A panel for each table that the tracker logs."""
    return [
        wr.WeavePanelSummaryTable(
            table_name=name, layout=wr.Layout(x=0, y=10 * index, w=_WIDTH, h=10)
        )
        for index, name in enumerate(("comparison", "completions"))
    ]


def specification(entity: str, project: str, metrics: Sequence[str]) -> dict[str, Any]:
    """The workspace and the report as --save sends them, without the library's random ids."""
    made = workspace(entity, project, metrics), report(entity, project, metrics)
    names = ("workspace", "report")
    return {
        name: _stable(each._to_model().model_dump(by_alias=True, exclude_none=True, mode="json"))
        for name, each in zip(names, made, strict=True)
    }


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in ("id", "__id__", "ref")}
    return [_stable(v) for v in value] if isinstance(value, list) else value


def _tasks(metrics: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[0] for name in metrics))


def _key(name: str, system: str) -> str:
    task, _, metric = name.rpartition("/")
    return f"{task}/{system}/{metric}"


def _place(index: int) -> wr.Layout:
    """Three panels in a row."""
    width = _WIDTH // 3
    return wr.Layout(x=width * (index % 3), y=8 * (index // 3), w=width, h=8)


if __name__ == "__main__":
    guarded(main, again="")
