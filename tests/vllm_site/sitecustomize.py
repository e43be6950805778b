"""Lets vLLM's model runner V2 run on a CPU, in tests alone: Triton's interpreter as its backend.

Python imports this module at its start where the folder is on PYTHONPATH, so that vLLM's worker
processes have it, too. vLLM asks Triton for an active driver; this one stands for a CPU.
"""

import importlib
import os
import types

os.environ["TRITON_INTERPRET"] = "1"
backends = importlib.import_module("triton.backends")  # vLLM brings it; nothing of ours needs it
driver = importlib.import_module("triton.runtime").driver


class Driver:
    """What vLLM and Triton's interpreter ask of a driver."""

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget("cpu", 0, 0)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_current_stream(self, *_):
        return 0

    def get_device_interface(self):
        import torch

        return torch.cpu


backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
driver.set_active(Driver())
