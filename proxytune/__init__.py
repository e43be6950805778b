"""Proxy-tuning: steer a large untuned language model with two small ones at decoding time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.api import Generation as Generation
    from proxytune.api import Generator as Generator
    from proxytune.api import load as load
    from proxytune.loading.spec import ModelSpec as ModelSpec

_HOMES = {
    "load": "proxytune.api",
    "Generation": "proxytune.api",
    "Generator": "proxytune.api",
    "ModelSpec": "proxytune.loading.spec",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing torch takes seconds, importing this package must not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
