"""Tiny triples whose base is behind an API, and the same in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from proxytune import api
from proxytune.loading.load import load_member
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.members.api import member
from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.tiny import save_tiny

PROMPTS = ["Natalia sold clips to", "def add(a", "The answer is", "4"]


def save_triple(folder: Path) -> Path:
    """Writes base, expert and antiexpert into a folder of their own each."""
    save_tiny(folder / "base", seed=0)
    save_tiny(folder / "expert", seed=1, hidden=16)
    save_tiny(folder / "antiexpert", seed=2, hidden=16)
    return folder


@cache
def in_process(folder: Path, alpha: float = 0.3) -> api.Generator:
    """The triple without HTTP."""
    names = ("base", "expert", "antiexpert")
    return api.load(**{name: str(folder / name) for name in names}, alpha=alpha)


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[str]:
    """The base behind our own server; gives its base URL."""
    base = api.load(str(folder / "base"))
    with running(create_app({"tiny": base}, ServerSettings(**settings))) as url:
        yield url


def over_http(folder: Path, url: str, alpha: float = 0.3, **settings: Any) -> api.Generator:
    """The triple with its base behind a URL, which is asked as if by a new process."""
    return api.load(base_at(folder, url, **settings), *small(folder), alpha)


def base_at(folder: Path, url: str, **settings: Any) -> ModelSpec:
    """The base behind a URL, which is probed anew when it is loaded."""
    member._probed.clear()
    return ModelSpec(str(folder / "base"), api={"base_url": url, "model": "tiny"} | settings)


@cache
def small(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """The expert and the antiexpert; loaded once, for loading takes longer than most tests."""
    expert, antiexpert = (
        load_member(ModelSpec(str(folder / name), dtype="float32"))
        for name in ("expert", "antiexpert")
    )
    return expert, antiexpert


def client_of(generator: api.Generator) -> Any:
    """The client behind a generator's base."""
    base: Any = generator.members["base"].member
    return base.client
