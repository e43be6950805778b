"""Calls a command's entry in this process, which has imported torch already."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch


def call(entry: Callable[[], object], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a process that runs `entry` with these arguments would have returned and said.

    A process of its own takes ten seconds to import torch and what else the command needs. A few
    tests start one all the same, so that the real command line is tried, too.
    """
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["run.py", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))
        try:
            entry()
        except SystemExit as end:
            code = end.code or 0
        finally:
            torch.set_num_threads(threads)
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
