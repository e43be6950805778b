"""What README.md and docs/ print is run here as it is printed, with local models for the hub's.

`RULES` says of every command, setting and snippet what is done with it; `SWAPS` is the one table of
what stands in for what. A command that is new in a document needs a rule, and a rule that fits
nothing any more has to go.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hydra.core.global_hydra import GlobalHydra

from proxytune.config import schema
from proxytune.files import ROOT
from proxytune.training import config as training
from tests.document_actions import (
    SERVE,
    Place,
    accelerate_takes,
    announces,
    capitals,
    capitals_module,
    collected,
    composes,
    extra_exists,
    formula_arguments,
    json_part,
    make_prints,
    member_arguments,
    own_file,
    own_formula,
    python_block,
    rescored,
    run,
    run_check,
    run_outside,
    serves,
    serves_the_page,
    skip,
    started_server,
    yaml_file,
)
from tests.documents import SNIPPETS, Snippet, snippets
from tests.openai_server import openai_server
from tests.test_alpaca_judge import prefers_good, weighs
from tests.test_rescore import put

# printed -> local, in this order; {tmp} is the test's folder, {server} and {judge} stand-ins' URLs
SWAPS = {
    ".venv/bin/": "",
    "Qwen/Qwen2.5-7B-Instruct": "pocket/models/tuned",
    "Qwen/Qwen2.5-0.5B-Instruct": "pocket/models/expert",
    "Qwen/Qwen2.5-0.5B": "pocket/models/antiexpert",
    "Qwen/Qwen2.5-7B": "pocket/models/base",
    "meta-llama/Llama-2-7b-hf": "pocket/models/antiexpert",
    "path/math": "pocket/models/expert",
    "path/chat": "pocket/models/expert",
    "path/small": "pocket/models/antiexpert",
    "ANTIEXPERT": "pocket/models/antiexpert",
    "EXPERT": "pocket/models/expert",
    "BASE": "pocket/models/base",
    "data=gsm8k": "data=gsm8k data_file=pocket/data/train/gsm8k.jsonl",
    "task=[gsm8k,truthfulqa_mc]": "task=[gsm8k,truthfulqa_mc] "
    "task.gsm8k.path=pocket/data/test/gsm8k.jsonl "
    "task.truthfulqa_mc.path=pocket/data/test/TruthfulQA.csv",
    "task=alpaca_eval": "task=alpaca_eval task.alpaca_eval.path={tmp}/alpaca.json",
    "arc_easy,hellaswag": "tiny_choice --include_path tests/lm_eval_tasks --limit 2",
    "limit=50": "limit=2",
    "../shared/published": "published",
    "rescore.py FOLDER": "rescore.py tests/golden/run_538a493",
    "results/bench/": "{tmp}/",
    "results/experts/": "{tmp}/",
    "/tmp/check": "{tmp}/check",
    "http://127.0.0.1:8000": "{server}",
    "http://localhost:8000/v1": "{judge}",
    "OPENAI_API_KEY=...": "OPENAI_API_KEY=secret OPENAI_BASE_URL={judge}",
    "task=capitals": "task=capitals hydra.searchpath=[file://{tmp}/mine] "
    "task.capitals.path={tmp}/capitals.jsonl",
}
ONE = "limit=1 report=false output_dir={tmp}/run"


@dataclass(frozen=True)
class Rule:
    """What is done with the snippets whose name (document: text) fits a pattern.

    Attributes:
        pattern: fits from the beginning to the end.
        action: takes the snippet, the rule's `more`, and the place where it runs.
        more: for `run`: arguments that say where to write, and to do little.
            For `skip`: why it cannot run. For `composes`: the file of conf/.
    """

    pattern: str
    action: Callable[[Snippet, str, "Place"], None]
    more: str = ""


# -- the table --------------------

ANY = r"[\w.]+: (?:\.venv/bin/)?"
RULES = [
    # run.py
    Rule(
        ANY + r"python run\.py name=mine task=\[gsm8k,truthfulqa_mc\] limit=50 .*",
        run,
        "output_dir={tmp}/run",
    ),
    Rule(ANY + r"python run\.py", run, ONE + " decoding.n=1"),
    Rule(ANY + r"python run\.py experiment=pocket_black_box", run, ONE),
    Rule(ANY + r"python run\.py experiment=llama70b_chat --cfg job", run),
    Rule(
        ANY + r"python run\.py -m alpha=0\.5,1\.0,1\.5",
        run,
        ONE + " task=[pocket_toxigen] systems=[proxy]",
    ),
    Rule(ANY + r"python run\.py experiment=gpt35_realtimeqa .*", composes),
    Rule(ANY + r"run\.py experiment=\w+", composes),
    Rule(ANY + r"python run\.py task=\[lm_eval/arc_easy,lm_eval/wikitext\]", composes),
    Rule(
        r"judges.md: OPENAI_API_KEY=\.\.\. python run\.py task=alpaca_eval .*",
        run,
        ONE + " systems=[tuned] task.alpaca_eval.judge.cache={tmp}/j.sqlite",
    ),
    Rule(
        r"judges.md: python run\.py task=alpaca_eval .*(base_url|local).*",
        run,
        ONE + " systems=[tuned] task.alpaca_eval.judge.cache={tmp}/j.sqlite "
        "task.alpaca_eval.judge.max_unparsed=1",
    ),
    Rule(
        r"formulas.md: python run\.py formula=\w+ .*",
        run,
        ONE + " task=[pocket_triviaqa] systems=[base,proxy]",
    ),
    Rule(
        r"formulas.md: PYTHONPATH=\. python run\.py formula\._target_=.*",
        own_formula,
        ONE + " task=[pocket_triviaqa] systems=[proxy]",
    ),
    # settings in the text
    Rule(r"vocabularies.md: (triple\.)?vocabulary=NAME", skip, "the form of a setting"),
    Rule(r"vocabularies.md: formula=proxy", composes),
    Rule(r"formulas.md: triple\.pairs\.\S+", composes),
    Rule(r"pocket.md: (triple|formula)=\w+", composes),
    Rule(r"formulas.md: formula(=NAME|\.KEY=VALUE)", skip, "the form of settings"),
    Rule(r"repro.md: ARGS=\S+", make_prints),
    Rule(r"formulas.md: formula=NAME,formula_KEY=VALUE", skip, "the form of settings"),
    Rule(r"(formulas|lm_eval).md: formula=\w+,formula_\w+=\S+", formula_arguments),
    Rule(r"lm_eval.md: (base_load_in_4bit|expert_\w+|math_\w+)=\S+", member_arguments),
    Rule(r"models.md: expert_think_end=\S+", member_arguments),
    Rule(r"lm_eval.md: (task)?\.\S+", composes, "config task=[lm_eval/arc_easy]"),
    Rule(r"own.md: task=capitals", capitals, ONE + " systems=[base,proxy]"),
    Rule(r"own.md: task=/path/capitals\.yaml", skip, "own_file runs one; tests/test_config.py"),
    Rule(r"own.md: PYTHONPATH=\. python run\.py \.\.\.", skip, "the form of a command"),
    Rule(r"serving.md: (system|engine|machine(\.\w+)?)=\S+", composes, "serve"),
    Rule(
        r"training.md: [a-z_.]+=\S+( [a-z_]+=\S+)*", composes, "train model=m data=d output_dir=o"
    ),
    Rule(r"README.md: triple=/path/mine\.yaml", own_file),
    Rule(r"README.md: systems=\S+", composes),
    Rule(r"README.md: triple=mine", skip, "a file that the reader is told to write"),
    Rule(r'README.md: speculative="auto"', skip, "an argument of `generate`, run in its snippet"),
    Rule(r"own.md: results/runs/NAME/alpha=0\.5", skip, "a folder's name"),
    Rule(r"serving.md: PROXYTUNE_API_KEY=secret", skip, "how the server of these tests is started"),
    Rule(
        r"(README|black_box|judges|lm_eval|models|own|performance|repro)\.md: (-m )?[\w.]+=\S+",
        composes,
    ),
    # check
    Rule(ANY + r"proxytune check .* limit=null .*", skip, "tests/test_trial.py runs it"),
    Rule(
        r"README.md: \.venv/bin/proxytune check .*",
        run_check,
        "output_dir={tmp}/run alphas=[] task.gsm8k.path=pocket/data/test/gsm8k.jsonl "
        "decoding.max_new_tokens=24",
    ),
    Rule(
        r"check.md: proxytune check .*",
        run_check,
        "output_dir={tmp}/run limit=2 alphas=[]",
    ),
    Rule(r"(README|formulas).md: proxytune check", skip, "its name"),
    Rule(r"check.md: helps: .*", skip, "what a check answers"),
    Rule(r"check.md: \w+=\S+", composes, "check triple=pocket"),
    # make
    Rule(ANY + r"make .*", make_prints),
    # other scripts
    Rule(
        r"black_box.md: python scripts/bench_api\.py --json results/bench/api\.json",
        run,
        "--prompts 1",
    ),
    Rule(
        r"black_box.md: python scripts/check_servers\.py .*",
        skip,
        "needs vLLM; tests/test_check_servers.py runs it on a stand-in",
    ),
    Rule(r"vocabularies.md: python scripts/bench_vocabularies\.py .*", run, "--no-steps"),
    Rule(r"performance.md: scripts/bench_api\.py", skip, "a file's name; black_box.md runs it"),
    Rule(
        r"performance.md: python scripts/bench\.py .*",
        run,
        "--size tiny --rounds 1",
    ),
    Rule(r"own.md: python scripts/rescore\.py FOLDER", run),
    Rule(r"repro.md: python scripts/rescore\.py \.\./shared/published --json .*", run),
    Rule(r"repro.md: python scripts/make_tables\.py --table 2", run, "--results {tmp}/results"),
    Rule(r"repro.md: python scripts/make_tables\.py --table 2 --rescored .*", rescored),
    Rule(
        r"training.md: python scripts/train_expert\.py .*",
        run,
        "train=pocket steps=1",
    ),
    Rule(r"training.md: accelerate launch .*", accelerate_takes),
    Rule(
        r"lm_eval.md: python -m proxytune\.harness run .*",
        run_outside,
    ),
    Rule(r"README.md: pytest .*", collected),
    Rule(ANY + r"proxytune watch .*", skip, "it ends by Ctrl-C; tests/test_watch.py runs it"),
    Rule(ANY + r"proxytune doctor", skip, "it asks the network; tests/test_help.py runs it"),
    Rule(r"models.md: pytest .* tests/test_families\.py", skip, "a test; `make test-slow` runs it"),
    # vLLM's environment; tests/test_vllm.py runs it
    Rule(r"performance.md: python scripts/bench_vllm\.py.*", skip, "needs vLLM's environment"),
    Rule(r"vllm.md: engine(\.\w+)*=\S+", composes),
    Rule(r"vllm.md: decoding(\.trace)?=\S+", composes),
    Rule(r"vllm.md: VLLM_USE_V2_MODEL_RUNNER=0", skip, "a switch of vLLM's"),
    Rule(r"developing.md: engine=vllm", composes),
    # several processes; tests/test_replicas.py, test_jobs.py and test_ranks.py start them
    Rule(r"scale.md: machine\.max_memory\.\w+=\S+", composes, "config machine=sharded"),
    Rule(r"scale.md: (machine(\.\w+)?|engine)=\S+", composes),
    Rule(r"scale.md: -m decoding\.batch_size=2,4", composes),
    Rule(r"scale.md: hydra/launcher=\w+", composes),
    Rule(r"scale.md: hydra\.launcher\.\S+", composes, "config hydra/launcher=slurm"),
    Rule(r"scale.md: python run\.py -m hydra/launcher=slurm .*", composes),
    Rule(r"scale.md: torchrun --nproc_per_node 2 run\.py .*", composes),
    Rule(r"scale.md: python scripts/bench_scale\.py .*", skip, "needs Ray; `make test-scale`"),
    Rule(r"vllm.md: python run\.py engine=vllm decoding=default", composes),
    Rule(r"vllm.md: pip install -e .*", skip, "vLLM's environment; `make vllm-env` makes it"),
    Rule(r"vllm.md: vllm serve BASE .*", skip, "the form of what `vllm-command` prints"),
    Rule(r"vllm.md: proxytune (serve|vllm-command) .*", skip, "tests/test_vllm.py runs them"),
    # the server and its clients
    Rule(ANY + r"proxytune serve triple=pocket port=8000", serves),
    Rule(r"serving.md: proxytune serve triple=pocket playground=true", serves_the_page),
    Rule(ANY + r"proxytune serve( triple=\.\.\. key=value \.\.\.)?", skip, "its name and form"),
    Rule(r"serving.md: serving pocket-proxy on .*", announces),
    Rule(r"serving.md: curl .*", run_outside),
    Rule(r"serving.md: OPENAI_API_KEY=secret lm_eval run .*", run_outside),
    Rule(r"serving.md: (from openai import|import requests).*", python_block),
    # whole snippets
    Rule(r"formulas.md: def halfway.*", skip, "own_formula runs it"),
    Rule(r"formulas.md: from functools .*", python_block),
    Rule(r"README.md: import proxytune.*", python_block),
    Rule(r'own.md: """Capitals of countries.*', capitals_module),
    Rule(r"own.md: capitals: .*", yaml_file, "task/capitals"),
    Rule(r"formulas.md: base: .*", yaml_file, "triple/pairs"),
    Rule(r"black_box.md: # conf/triple/mine\.yaml .*", yaml_file, "triple/mine"),
    Rule(r'black_box.md: "extra": .*', json_part),
    # what is no command
    Rule(r"README.md: logits = .*", skip, "the formula"),
    Rule(
        r"(README.md: run\.py the|own.md: table\.md,|developing.md: harness, cli) .*",
        skip,
        "what lies where",
    ),
    # other programs
    Rule(ANY + r"pip install '?(proxytune|\.)(\[\w+\])?'?", extra_exists),
    Rule(
        ANY + r"(pip install 'lm-eval.*|vllm serve .*|hf auth login|git clone .*)",
        skip,
        "another program's, which needs a network, a GPU or an account",
    ),
]


RUNS = (run, run_check, run_outside, rescored, serves, serves_the_page, announces)


def rule_of(snippet: Snippet) -> Rule | None:
    """The first rule that fits."""
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, snippet.name)), None)


def cases() -> Iterator[pytest.ParameterSet]:
    """Every snippet with its rule; a command that several documents print comes once.

    What starts a run or a server is slow.
    """
    seen = set()
    for snippet in SNIPPETS:
        rule = rule_of(snippet)
        known = (snippet.kind, snippet.text.removeprefix(".venv/bin/"), rule and rule.more)
        if rule and known not in seen:
            seen.add(known)
            asks = "://127.0.0.1" in snippet.text  # the server that the documents start
            marks = [pytest.mark.slow] if rule.action in RUNS or asks else []
            yield pytest.param(snippet, rule, id=snippet.name[:70], marks=marks)


def test_everything_that_is_printed_has_a_rule():
    lost = [f"{s.kind} in {s.name}" for s in SNIPPETS if rule_of(s) is None]
    assert not lost, (
        "no rule says what is done with these; add one to RULES in tests/test_documents.py, and "
        "what stands in for models and data to SWAPS: " + "\n".join(lost)
    )


def test_every_rule_and_swap_is_used():
    used = {id(rule_of(snippet)) for snippet in SNIPPETS}
    assert not [rule.pattern for rule in RULES if id(rule) not in used], "take these rules out"
    text = "\n".join(snippet.text for snippet in SNIPPETS)
    assert not [printed for printed in SWAPS if printed not in text], "take these swaps out"


def test_a_new_command_is_found_wherever_it_stands(tmp_path):
    """Fenced, indented, in the text or a table; outputs and comments are no commands."""
    page = tmp_path / "new.md"
    page.write_text(
        "Say `python scripts/new.py a` or\n`hf upload b`, `new.key=1` and not `make` alone.\n\n"
        "    # a comment that isn't one\n    A=1 make new \\\n        X=1   # the user's\n"
        '    curl -d \'{"a": 1,\n             "b": 2}\'\n\n'
        "| a |\n|---|\n| `run.py c=1` |\n\n```\nproxytune new d\n```\n\n    its output\n\n"
        "```python\nprint(1)\n```\n\n    1\n\nText.\n\n    a drawing\n"
    )
    found = snippets(page)
    assert [(s.kind, s.text.split()[-1], s.output) for s in found] == [
        ("command", "X=1", ""),
        ("command", "2}'", ""),
        ("command", "d", ""),
        ("python", "print(1)", "1"),
        ("block", "drawing", ""),
        ("command", "a", ""),
        ("command", "b", ""),
        ("setting", "new.key=1", ""),
        ("command", "c=1", ""),
    ]
    assert [s.text for s in found if rule_of(s)] == []


@pytest.mark.parametrize(("snippet", "rule"), list(cases()))
def test_what_is_printed_works(snippet, rule, place):
    rule.action(snippet, rule.more, place)


# -- the place --------------------


@pytest.fixture
def place(tmp_path, monkeypatch, request, capsys) -> Place:
    for entry in ("conf", "pocket", "proxytune", "run.py", "scripts", "tasks", "tests"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    schema.register()
    training.register()
    GlobalHydra.instance().clear()
    (tmp_path / "alpaca.json").write_text('[{"instruction": "Say hello.", "output": "Hello."}]')
    answer = {"question": "q", "answer": "3", "model_output": "1 3.", "prediction": "3"}
    put(tmp_path / "published" / "gsm" / "dexperts-13B", "predictions.jsonl", [answer])
    put(tmp_path / "published" / "gsm" / "dexperts-13B", "metrics.json", {"exact_match": 1.0})
    return Place(tmp_path, monkeypatch, request, capsys, SWAPS)


@pytest.fixture(scope="module")
def server_said() -> Iterator[str]:
    """Starts the server of docs/serving.md on a free port; what it says once it can be reached."""
    with started_server(*SERVE[1:]) as said:
        yield said


@pytest.fixture(scope="module")
def server(server_said) -> str:
    """Its address."""
    return re.findall(r"http://[\d.]+:\d+", server_said)[0]


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """An OpenAI-compatible endpoint that answers as AlpacaEval's annotators expect."""
    with openai_server(lambda body: (weighs if "logprobs" in body else prefers_good)(body)) as fake:
        yield fake.url
