"""Hydra's own sweeper (`-m`), which refuses points that would write to one folder.

At the end it writes the page over all points.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from proxytune.cli.sweep import check_points, point_folder, report_sweep
from proxytune.errors import UserError

log = logging.getLogger(__name__)


class PointsSweeper(BasicSweeper):
    """Runs every combination of the values that the command line gives."""

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the points, then writes the page over them (report=false leaves it out)."""
        self._folders: list[Path] = []
        try:
            returned = super().sweep(arguments)
        except SystemExit as end:
            if end.code == 1:  # a person's mistake, which the point has explained
                log.warning(
                    "the sweep ends here, and the points after this one were not started; the "
                    "same command keeps what is finished"
                )
            raise
        for folder in dict.fromkeys(self._folders):
            report_sweep(folder)
        return returned

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes and checks every point before the first of them starts.

        Raises:
            UserError: a setting of a point is wrong, or two points would write to one folder.
        """
        from proxytune.experiment.checks import check_config

        assert self.config is not None and self.hydra_context is not None
        if self.batch_index > 1 or self.overrides is None:
            return
        loader = self.hydra_context.config_loader
        points, sweeps = [], set()
        for number, settings in enumerate(chain.from_iterable(self.overrides), start=1):
            cfg = loader.load_sweep_config(self.config, list(settings))
            try:
                check_config(cfg)
            except UserError as error:
                raise UserError(f"point {number} of the sweep: {error}") from error
            sweeps.add(str(cfg.output_dir))
            folder = point_folder(str(cfg.output_dir), cfg.hydra.job.override_dirname)
            if folder != Path(cfg.output_dir) and folder.is_symlink():
                raise UserError(f"{folder} is a symbolic link, and nothing is written through one")
            points.append((settings, folder))
            if cfg.report and cfg.stage != "generate" and folder != Path(cfg.output_dir):
                self._folders.append(Path(cfg.output_dir))
        check_points(points)
        if len(sweeps) > 1:
            log.warning(
                "the points have %d values of output_dir, and points in one alone share what they "
                "generate; without output_dir, each still writes to a folder of its own",
                len(sweeps),
            )
