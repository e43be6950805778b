"""`proxytune doctor`: what an issue needs to know of a machine, ready to be pasted."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proxytune.files import ROOT
from proxytune.loopback import PROXIES, is_loopback
from proxytune.secrets import redacted

_SECONDS = 5  # for each address


_EXAMPLES = """\
examples:
  proxytune doctor                              this machine, the hub, W&B and OpenAI
  proxytune doctor http://localhost:8000/v1     and the server of a base behind an API
"""


def doctor(words: Sequence[str] = ()) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="proxytune doctor",
        description="Prints versions, devices, memory, disk, and which addresses can be reached.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("urls", metavar="URL", nargs="*", help="a further address to try")
    urls = parser.parse_args(words).urls
    for url in urls:
        if not re.match(r"https?://", url):
            parser.error(f"{redacted(url)} is no address: it begins with http:// or https://")
    report(urls)


def report(urls: Sequence[str] = ()) -> None:
    """Prints the report.

    Args:
        urls: further addresses to try, such as that of a base behind an API.
    """
    for title, lines in (
        ("proxytune", _program()),
        ("packages", _packages()),
        ("extras", _extras()),
        ("machine", _machine()),
        ("network", _network(urls)),
    ):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines), flush=True)


def _program() -> Iterator[str]:
    yield f"version {_version('proxytune') or 'not installed'}, in {ROOT}"
    yield f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    head = ROOT / ".git" / "HEAD"
    if head.is_file():
        name = head.read_text().strip().removeprefix("ref: ")
        ref = ROOT / ".git" / name
        yield f"commit {ref.read_text().strip() if ref.is_file() else name}"


def _packages() -> Iterator[str]:
    names = ("torch", "transformers", "tokenizers", "numpy", "accelerate", "hydra-core", "vllm")
    yield ", ".join(f"{name} {_version(name) or '-'}" for name in names)


def _extras() -> Iterator[str]:
    """Which extras are complete, and what the others lack."""
    try:
        wanted = importlib.metadata.requires("proxytune") or []
        extras = importlib.metadata.metadata("proxytune").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        yield "proxytune is not installed here; `pip install -e .` in its folder does that"
        return
    for extra in extras:
        marked = [line for line in wanted if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        names = [re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0] for line in marked]
        names = [name for name in names if name != "proxytune"]  # an extra of several others
        missing = [name for name in names if _version(name) is None]
        lacks = f"lacks {', '.join(missing)}" if missing else "complete"
        if names:
            yield f"{extra}: {lacks}"


def _machine() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"{cores} cores, {_memory()}"
    for folder in dict.fromkeys((ROOT, _cache())):
        place = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(place).free / 1e9
        yield f"{free:.0f} GB of disk free for {folder}"
    try:
        import torch
    except ImportError as error:
        yield f"torch cannot be imported: {error}"
        return
    if not torch.cuda.is_available():
        yield f"no GPU that torch {torch.__version__} sees"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield f"cuda:{number} {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


def _memory() -> str:
    """The memory of the machine; "" where the system does not tell."""
    found = Path("/proc/meminfo")
    if not found.is_file():
        return "memory unknown"
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", found.read_text()))
    free, total = (int(kilobytes[key]) / 1e6 for key in ("MemAvailable", "MemTotal"))
    return f"{free:.0f} of {total:.0f} GB of memory free"


def _cache() -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _network(urls: Sequence[str]) -> Iterator[str]:
    for name in (*PROXIES, "NO_PROXY"):
        for spelt in (name, name.lower()):
            if os.environ.get(spelt):
                yield f"{spelt}={redacted(os.environ[spelt])}"
    addresses = {
        "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "W&B": os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"),
        "OpenAI": os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        **{url: url for url in urls},
    }
    keys = {"hub": "HF_TOKEN", "W&B": "WANDB_API_KEY", "OpenAI": "OPENAI_API_KEY"}
    with ThreadPoolExecutor(len(addresses)) as pool:
        found = pool.map(_reached, addresses.values())
        for (name, address), state in zip(addresses.items(), found, strict=True):
            key = keys.get(name)
            known = "" if key is None else f", {key} {'is' if os.environ.get(key) else 'not'} set"
            label = "" if name == address else f"{name}: "
            yield f"{label}{redacted(address)} {state}{known}"


def _reached(address: str) -> str:
    """Whether an address answers; any status does."""
    try:
        bare = re.sub(r"://[^/@]*@", "://", address)  # urllib takes a password for a host
        request = urllib.request.Request(bare, headers={"User-Agent": "proxytune-doctor"})
        # no proxy reaches this machine; `None` takes the environment's
        proxies = urllib.request.ProxyHandler({} if is_loopback(address) else None)
        with urllib.request.build_opener(proxies).open(request, timeout=_SECONDS) as answer:
            return f"answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"answers {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"cannot be reached ({redacted(str(reason))})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
