"""Real clients against the server: lm-eval, the command itself, and many at once."""

import itertools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lm_eval.evaluator
import openai
import pytest
import requests
from lm_eval.tasks import TaskManager

from proxytune import api, cli
from proxytune.files import ROOT
from proxytune.harness.model import ProxyTuneLM
from proxytune.server import create_app
from tests.commands import call
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer

TASKS = str(ROOT / "tests" / "lm_eval_tasks")


def triple() -> api.Generator:
    models = [tiny_model(seed=0), tiny_model(seed=1, hidden=16), tiny_model(seed=2, hidden=16)]
    return api.load(*models, alpha=0.7, tokenizer=tiny_tokenizer())


# -- lm-eval --------------------


@pytest.mark.slow
def test_lm_eval_over_http_gives_the_in_process_harness_s_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tiny_tokenizer().save_pretrained(tmp_path)

    def evaluate(model, **arguments):
        found = lm_eval.simple_evaluate(
            model,
            tasks=["tiny_choice", "tiny_generate", "tiny_perplexity"],
            task_manager=TaskManager(include_path=TASKS, include_defaults=False),
            bootstrap_iters=0,
            **arguments,
        )
        answers = {
            (task, sample["doc_id"]): sample["filtered_resps"]
            for task, samples in found["samples"].items()
            for sample in samples
        }
        return found["results"], answers

    # of its context, local-completions leaves a token for the answer and one for the prefix
    expected = evaluate(ProxyTuneLM(generator=triple(), max_length=510, progress=False))
    with running(create_app({"tiny": triple()})) as url:
        arguments = {
            "base_url": f"{url}/completions",
            "model": "tiny",
            "tokenizer": str(tmp_path),
            "num_concurrent": 4,
            "max_length": 512,
            "add_bos_token": True,
        }
        found = evaluate("local-completions", model_args=arguments)
    for (task, document), answers in expected[1].items():
        for ours, theirs in zip(answers, found[1][task, document], strict=True):
            assert theirs == (ours if isinstance(ours, str) else pytest.approx(ours, abs=1e-3))
    for task, metrics in expected[0].items():
        numbers = {name: v for name, v in metrics.items() if isinstance(v, float)}
        assert numbers
        for name, value in numbers.items():
            assert found[0][task][name] == pytest.approx(value, rel=1e-4), (task, name)


# -- the command --------------------


def command(*arguments: str) -> list[str]:
    program = "from proxytune.cli import main; main()"
    return [sys.executable, "-c", program, "serve", *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_command_serves_a_triple_until_it_is_interrupted(tmp_path):
    process = subprocess.Popen(
        command("triple=pocket", "port=0", "alpha=0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"PROXYTUNE_API_KEY": "secret"},
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving pocket-proxy on http://127.0.0.1:")
        url = line.split()[3]
        assert requests.get(f"{url}/models").status_code == 401
        client = openai.OpenAI(base_url=url, api_key="secret")
        prompt = "Question: What is 3 + 4?\nAnswer:"
        asked = {"model": "pocket-proxy", "prompt": prompt, "max_tokens": 20, "temperature": 0}
        answer = client.completions.create(**asked)
        folder = ROOT / "pocket" / "models"
        roles = {r: str(folder / r) for r in ("base", "expert", "antiexpert")}
        alone = api.load(**roles, alpha=0.5, dtype="float32", device="cpu")
        assert answer.choices[0].text == alone.generate([prompt], max_new_tokens=20)[0].text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.iterdir())  # a server leaves no files behind


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["triple=pokcet"], "unknown triple 'pokcet' (did you mean pocket?)"),
        (
            ["triple=pocket", "max_logprob=5"],
            "unknown key 'max_logprob' (did you mean max_logprobs?)",
        ),
        (["triple=pocket", "port=TAKEN"], "already in use"),
    ],
    ids=["triple", "key", "port"],
)
def test_a_mistake_is_one_line(arguments, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = [each.replace("TAKEN", port) for each in arguments]
        done = call(cli.main, "serve", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error:") and said in line


def test_a_mistake_of_the_command_itself_is_one_line():
    process = command("triple=pokcet")
    done = subprocess.run(process, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: unknown triple 'pokcet'")
    assert done.stderr.count("\n") == 1


# -- many clients --------------------


def ask(client: openai.OpenAI, body: dict) -> str:
    """The text of one answer, streamed or not."""
    body = dict(body)
    extra = {"alpha": body.pop("alpha")} if "alpha" in body else {}
    answer = client.completions.create(model="pocket", extra_body=extra, **body)
    if not body["stream"]:
        return answer.choices[0].text
    return "".join(choice.text for chunk in answer for choice in chunk.choices)


def load_test(seconds: float, clients: int, app, alone) -> Counter:
    """Lets many clients ask different things at once; every answer must be the answer alone."""
    words = ["Question: ", "Tom has 4 apples.", "def f(x):\n", "The capital of", "Answer: 12"]
    bodies = []
    for number in range(4 * clients):
        body = {"prompt": f"{words[number % 5]} {number}\n", "max_tokens": 8 + number % 41}
        body |= {"temperature": 0.9 * (number % 3 > 0), "seed": number, "stream": number % 2 == 0}
        body |= {"alpha": (0.0, 0.5, 1.5)[number % 3]} if number % 4 == 0 else {}
        body |= {"stop": ["\n\n", "4"]} if number % 5 == 0 else {}
        bodies.append(body)
    expected = []
    for body in bodies:
        settings = {k: v for k, v in body.items() if k in ("temperature", "seed", "stop")}
        alone.system.alphas = {"alpha": body.get("alpha", 1.0)}
        (one,) = alone.generate([body["prompt"]], max_new_tokens=body["max_tokens"], **settings)
        expected.append(one.text)
    alone.system.alphas = {"alpha": 1.0}
    assert len(set(expected)) > clients
    counts = Counter()
    lock = threading.Lock()

    def run(number: int, url: str, end: float) -> None:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        choose = random.Random(number)
        for turn in itertools.count():
            if turn and time.monotonic() > end:
                return
            which = choose.randrange(len(bodies))
            try:
                kind = "right" if ask(client, bodies[which]) == expected[which] else "wrong"
            except Exception as error:
                kind = f"{type(error).__name__}: {error}"
            with lock:
                counts[kind] += 1

    with running(app) as url, ThreadPoolExecutor(clients) as pool:
        end = time.monotonic() + seconds
        for done in [pool.submit(run, number, url, end) for number in range(clients)]:
            done.result()
        metrics = requests.get(f"{url.removesuffix('/v1')}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert lines['proxytune_running_rows{model="pocket"}'] == "0.0"
    assert lines['proxytune_waiting{model="pocket"}'] == "0.0"
    counts["tokens"] = int(float(lines['proxytune_generated_tokens_total{model="pocket"}']))
    return counts


def pocket() -> api.Generator:
    folder: Path = ROOT / "pocket" / "models"
    roles = {r: str(folder / r) for r in ("base", "expert", "antiexpert")}
    return api.load(**roles, dtype="float32", device="cpu")


@pytest.mark.slow
def test_a_few_clients_at_once_get_what_they_would_get_alone():
    counts = load_test(1, 8, create_app({"pocket": pocket()}), pocket())
    # on a busy machine, each of them may get one answer only within the second
    assert set(counts) == {"right", "tokens"} and counts["right"] >= 8


@pytest.mark.slow
def test_64_clients_for_a_minute():
    counts = load_test(60, 64, create_app({"pocket": pocket()}), pocket())
    print(counts)
    assert set(counts) == {"right", "tokens"} and counts["right"] > 64
