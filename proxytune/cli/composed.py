"""Hydra's entries: conf/ composed with the command line, handed to the code that does the work."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from proxytune.cli.guard import guarded
from proxytune.cli.sweep import point_folder
from proxytune.config import given
from proxytune.config.schema import register
from proxytune.errors import extra
from proxytune.files import shipped
from proxytune.loading.launched import launched


def run() -> None:
    """Composes conf/config.yaml and runs the experiment."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it, Hydra exits before we can explain
    guarded(lambda: _compose(_run))


def check() -> None:
    """Composes conf/check.yaml and tries a triple on a few examples."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    guarded(lambda: _compose(_check))


def serve() -> None:
    """Composes conf/serve.yaml and serves a triple; docs/serving.md."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    guarded(lambda: _compose(_serve), again="")


def print_command() -> None:
    """Composes conf/serve.yaml and prints the line that starts plain vLLM; docs/vllm.md."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    guarded(lambda: _compose(_print_command), again="")


def _compose(main: Callable[[], object]) -> None:
    """Calls one of Hydra's entries with the command line, its own files given by name."""
    words = given.take(sys.argv[1:])
    # argparse knows no setting after a flag that stands among settings ("limit=2 -m alpha=0,1")
    sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))
    main()


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
def _run(cfg: DictConfig) -> None:
    sweep = None
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # Each point of a sweep is another configuration, so it gets another folder.
        folder = point_folder(cfg.output_dir, HydraConfig.get().job.override_dirname)
        sweep = Path(cfg.output_dir) if folder != Path(cfg.output_dir) else None
        cfg.output_dir = str(folder)

    def experiment() -> None:
        with extra("experiments", "proxytune run"):
            from proxytune.experiment.runner import run_experiment

        run_experiment(cfg, sweep)

    if launched()[0] > 0:
        guarded(lambda: _follow(cfg), again="")
        return

    # Called inside of Hydra's own handler, which would otherwise print a line before ours.
    guarded(experiment)


def _follow(cfg: DictConfig) -> None:
    """What the ranks after the first do (torchrun); the first one runs the experiment."""
    if cfg.stage == "score" or cfg.machine.tensor_parallel != launched()[1]:
        return  # the first rank says what is wrong
    from proxytune.experiment.ranks import follow

    follow(cfg.machine.threads)


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="check")
def _check(cfg: DictConfig) -> None:
    choice = HydraConfig.get().runtime.choices.get("triple")

    def trial() -> None:
        with extra("experiments", "proxytune check"):
            from proxytune.experiment.trial import run_check

        run_check(cfg, choice)

    guarded(trial)


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="serve")
def _serve(cfg: DictConfig) -> None:
    choice = HydraConfig.get().runtime.choices.get("triple")

    def server() -> None:
        with extra("serve", "proxytune serve"):
            from proxytune.cli.serve import serve

        serve(cfg, choice)

    guarded(server, again="")


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="serve")
def _print_command(cfg: DictConfig) -> None:
    choice = HydraConfig.get().runtime.choices.get("triple")

    def printed() -> None:
        with extra("serve", "proxytune vllm-command"):
            from proxytune.cli.serve import vllm_command

        print(vllm_command(cfg, choice))

    guarded(printed, again="")


register()
