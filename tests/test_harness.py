"""lm-eval on our generators: the same numbers as lm-eval's own `hf` model, and as sums by hand."""

import logging
import subprocess
import sys
from pathlib import Path

import lm_eval.evaluator
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from proxytune import api
from proxytune.cli.guard import guarded
from proxytune.errors import UserError
from proxytune.harness import __main__ as harness_command
from proxytune.harness import evaluation
from proxytune.harness.model import ProxyTuneLM
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from tasks.lm_eval_task import LmEvalTask
from tests.tiny import save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tests" / "lm_eval_tasks"
PAIRS = [
    ("Question: What is the capital of France?\nAnswer:", " Paris"),
    ("Question: What is the capital of France?\nAnswer: ", "Paris"),  # the space moves over
    ("", "Natalia sold clips"),  # no context: BOS stands for it
    ("def add(a, b):\n", "    return a + b"),
    ("clips in April " * 120, " clips"),  # longer than the context: its beginning is dropped
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "base": save_tiny(root / "base", seed=0),
        "expert": save_tiny(root / "expert", seed=1, hidden=16),
        "antiexpert": save_tiny(root / "antiexpert", seed=2, hidden=16),
    }


@pytest.fixture(scope="module")
def triple(folders) -> api.Generator:
    return api.load(*map(str, folders.values()), alpha=0.7, device="cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """lm-eval asks pip and git about the machine after every evaluation: seconds each."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def hf(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def proxy_log_probs(folders, ids: list[int], alpha: float) -> torch.Tensor:
    """Log-probabilities of the formula from three plain forward passes, [tokens, vocab]."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
            for folder in folders.values()
        ]
    return (logits[0] + alpha * (logits[1] - logits[2])).log_softmax(-1)


# -- equal to lm-eval's own model --------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize("role", ["base", "expert"])
def test_a_single_model_has_the_log_likelihoods_of_hf(folders, role):
    ours = ProxyTuneLM(base=str(folders[role]), device="cpu", progress=False)
    theirs = hf(folders[role])
    pairs = requests("loglikelihood", PAIRS)
    for mine, own in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert mine[0] == pytest.approx(own[0], abs=1e-4)
        assert mine[1] == own[1]
    texts = requests("loglikelihood_rolling", [("Natalia sold clips",), ("April " * 300,)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), rel=1e-6, abs=1e-4
    )


@pytest.mark.slow
def test_a_single_model_generates_what_hf_generates(folders):
    contexts = [context for context, _ in PAIRS if context]
    settings = [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        {"until": ["u", "8"], "max_new_tokens": 9},
    ]
    asked = [(c, dict(s)) for s in settings for c in contexts]
    for role in ("base", "expert"):
        ours = ProxyTuneLM(base=str(folders[role]), device="cpu", progress=False)
        found = ours.generate_until(requests("generate_until", asked))
        expected = hf(folders[role]).generate_until(requests("generate_until", asked))
        assert found == expected
        assert len(set(found)) > 3


def test_a_repetition_penalty_is_that_of_hf(folders):
    """Greedy, too. On 538a493 it was refused: "repetition_penalty=1.8 cannot be done here"."""
    asked = [(PAIRS[0][0], {"until": [], "max_gen_toks": 20, "repetition_penalty": 1.8})]
    plain = [(PAIRS[0][0], {"until": [], "max_gen_toks": 20, "repetition_penalty": 1.0})]
    for role in ("base", "expert"):
        ours = ProxyTuneLM(base=str(folders[role]), device="cpu", progress=False)
        found = ours.generate_until(requests("generate_until", asked))
        expected = hf(folders[role]).generate_until(requests("generate_until", asked))
        assert found == expected
        assert found != ours.generate_until(requests("generate_until", plain))


def test_whole_tasks_equal_hf(folders):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    names = ["tiny_choice", "tiny_perplexity", "tiny_generate"]
    found = [
        lm_eval.evaluator.simple_evaluate(
            model, tasks=list(names), task_manager=manager, bootstrap_iters=0, num_fewshot=0
        )
        for model in (
            hf(folders["base"]),
            ProxyTuneLM(base=str(folders["base"]), device="cpu", progress=False),
        )
    ]
    for name in names:
        own, ours = (
            {k: v for k, v in each["results"][name].items() if not isinstance(v, str)}
            for each in found
        )
        assert ours == pytest.approx(own, rel=1e-5) and ours


# -- equal to a sum by hand --------------------


@pytest.mark.thinned(1)
def test_the_triples_log_likelihood_is_the_sum_by_hand(folders, triple):
    lm = ProxyTuneLM(generator=triple, progress=False)
    tokenizer = tiny_tokenizer()
    found = lm.loglikelihood(requests("loglikelihood", PAIRS[:1] + PAIRS[3:4]))
    for (context, continuation), (value, greedy) in zip(PAIRS[:1] + PAIRS[3:4], found, strict=True):
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
        before = len(tokenizer(context)["input_ids"])
        ids = tokenizer(context + continuation)["input_ids"]
        log_probs = proxy_log_probs(folders, ids, alpha=0.7)
        by_hand = sum(log_probs[i - 1, ids[i]].item() for i in range(before, len(ids)))
        assert value == pytest.approx(by_hand, abs=1e-4)
        assert greedy == all(
            log_probs[i - 1].argmax().item() == ids[i] for i in range(before, len(ids))
        )


def test_the_greedy_flag_is_true_for_what_greedy_decoding_writes(triple):
    lm = ProxyTuneLM(generator=triple, progress=False)
    (generation,) = triple.generate(["Natalia sold"], max_new_tokens=5)
    context = tiny_tokenizer()("Natalia sold")["input_ids"]
    likely = list(generation.token_ids)
    answers = lm._loglikelihood_tokens(
        [(None, context, likely), (None, context, [*likely[:-1], (likely[-1] + 1) % 300])]
    )
    assert [greedy for _, greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]


def test_rolling_windows_predict_each_token_once(folders, triple):
    """With a context of 16 tokens, by hand: the first 16 behind BOS, then windows of 16."""
    lm = ProxyTuneLM(generator=triple, progress=False, max_length=16)
    text = "Natalia sold clips to 48 of her friends in April"
    ids = tiny_tokenizer()(text)["input_ids"]
    assert 16 < len(ids) < 32
    first = proxy_log_probs(folders, [1, *ids[:15]], alpha=0.7)
    total = sum(first[i, ids[i]].item() for i in range(16))
    last = proxy_log_probs(folders, ids[len(ids) - 17 : -1], alpha=0.7)
    rest = len(ids) - 16
    total += sum(last[16 - rest + i, ids[16 + i]].item() for i in range(rest))
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx(total, abs=1e-4)


def test_batching_changes_nothing(triple):
    one = ProxyTuneLM(generator=triple, batch_size=1, progress=False)
    many = ProxyTuneLM(generator=triple, batch_size="auto:4", progress=False)
    pairs = requests("loglikelihood", PAIRS)
    for a, b in zip(one.loglikelihood(pairs), many.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_the_choices_of_a_question_share_its_prompt(triple, monkeypatch):
    prefilled = []
    real = triple.system.prefill
    monkeypatch.setattr(
        triple.system, "prefill", lambda prompts: prefilled.append(len(prompts)) or real(prompts)
    )
    choices = [
        (f"Question {i}?\nAnswer:", c) for c in (" a", " forty two", " x y z") for i in (1, 2)
    ]
    found = ProxyTuneLM(generator=triple, progress=False).loglikelihood(
        requests("loglikelihood", choices)
    )
    assert prefilled == [2]
    for pair, together in zip(choices, found, strict=True):
        (alone,) = ProxyTuneLM(generator=triple, progress=False).loglikelihood(
            requests("loglikelihood", [pair])
        )
        assert together == pytest.approx(alone, abs=1e-4)


# -- chat templates per role --------------------


def test_each_member_reads_the_conversation_in_its_own_format(folders):
    chat = PromptFormat(kind="chat")
    specs = {
        role: ModelSpec(
            str(folder), device="cpu", format=chat if role == "expert" else PromptFormat()
        )
        for role, folder in folders.items()
    }
    generator = api.load(**specs)
    lm = ProxyTuneLM(generator=generator, progress=False)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    context = lm.apply_chat_template(messages)
    raw = tiny_tokenizer()("Be kind.\n\nHello")["input_ids"]
    text = "<s><|system|>\nBe kind.\n<|user|>\nHello\n<|assistant|>\n"
    chatted = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    expected = {"base": raw, "expert": chatted, "antiexpert": raw}

    settings = {"until": [], "max_gen_toks": 6}
    (found,) = lm.generate_until(requests("generate_until", [(context, settings)]))
    (direct,) = generator.generate([expected], max_new_tokens=6)
    assert found == tiny_tokenizer().decode(direct.token_ids, skip_special_tokens=True)

    (scored,) = lm.loglikelihood(requests("loglikelihood", [(context, " Paris")]))
    target = tiny_tokenizer()(" Paris")["input_ids"]
    (by_engine,) = generator.loglikelihood([(expected, target)])
    assert scored == pytest.approx(by_engine, abs=1e-5)
    plain = ProxyTuneLM(generator=api.load(*map(str, folders.values())), progress=False)
    with pytest.raises(ValueError, match="no member has a chat format"):
        plain.apply_chat_template(messages)
    assert lm.tokenizer_name != plain.tokenizer_name


@pytest.mark.slow
def test_chat_template_args_reach_every_template_that_reads_them(folders, tmp_path):
    """Under lm-eval's own names for them; the recorded formats and cache names say so."""
    template = tmp_path / "think.jinja"
    template.write_text("{{ messages[0]['content'] }}{% if enable_thinking %}!{% endif %}")
    given = {role: str(folder) for role, folder in folders.items()}
    given |= {"expert_chat_template": str(template), "device": "cpu", "progress": False}
    plain = ProxyTuneLM(**given)
    context = plain.apply_chat_template([{"role": "user", "content": "Hello"}])
    for more in (
        {"enable_thinking": True},
        {"chat_template_args": {"enable_thinking": True}},
        {"chat_template_args": '{"enable_thinking": true}'},
    ):
        lm = ProxyTuneLM(**given, **more)
        assert lm._texts(context) == {"base": "Hello", "expert": "Hello!", "antiexpert": "Hello"}
        assert lm.tokenizer_name != plain.tokenizer_name
        assert lm.get_model_info()["proxytune_chat_template_args"] == {"enable_thinking": True}
    assert plain._texts(context)["expert"] == "Hello"
    with pytest.raises(UserError, match="no member's chat template reads thinks"):
        ProxyTuneLM(**given, chat_template_args={"thinks": True})
    with pytest.raises(UserError, match="is no JSON object"):
        ProxyTuneLM(**given, chat_template_args="think")


def test_several_pairs_in_flat_arguments(folders):
    """Two half pairs of one expert are the pair; each half may have its own alpha and format."""
    small = {"expert": str(folders["expert"]), "antiexpert": str(folders["antiexpert"])}
    usual = {"base": str(folders["base"]), "device": "cpu", "progress": False}
    halves = {f"{pair}_{role}": path for pair in ("a", "b") for role, path in small.items()}
    asked = requests("loglikelihood", PAIRS[:1])
    one = ProxyTuneLM(**usual, **small, alpha=0.8).loglikelihood(asked)[0]
    two = ProxyTuneLM(**usual, **halves, alpha=0.5, a_alpha="0.3")
    assert two.loglikelihood(asked)[0] == pytest.approx(one, abs=1e-4)
    assert two.get_model_info()["proxytune_alpha"] == {"a_alpha": 0.3, "b_alpha": 0.5}
    chat = ProxyTuneLM(**usual, **halves, b_expert_format="chat")
    assert chat._formats["b_expert"].kind == "chat" and chat._formats["a_expert"].kind == "raw"


def test_a_single_chat_model_equals_hf_with_its_template(folders):
    ours = ProxyTuneLM(base=str(folders["base"]), base_format="chat", device="cpu", progress=False)
    theirs = hf(folders["base"])
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    contexts = [lm.apply_chat_template(messages) for lm in (ours, theirs)]
    scores = [
        lm.loglikelihood(requests("loglikelihood", [(c, "Paris")]))[0]
        for lm, c in zip((ours, theirs), contexts, strict=True)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    settings = {"until": ["\n\n"], "max_gen_toks": 10}
    texts = [
        lm.generate_until(requests("generate_until", [(c, dict(settings))]))
        for lm, c in zip((ours, theirs), contexts, strict=True)
    ]
    assert texts[0] == texts[1]


# -- mistakes --------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs base="),
        ({"base": "x", "pretrained": "y"}, "unknown argument 'pretrained'"),
        ({"base": "x", "expert_format": "chat"}, r"without expert="),
        ({"base": "x", "base_format": "chatty"}, "neither raw nor chat"),
        ({"base": "x", "a_expert": "y"}, "a_expert=y is given without a_antiexpert="),
        ({"base": "x", "a_alpha": 0.5}, r"a_alpha=0\.5 is given without a_expert="),
        ({"base": "x", "a_b_expert": "y"}, "unknown argument 'a_b_expert'"),
        ({"base": "x", "a_expert_speed": 1}, "unknown argument 'a_expert_speed'"),
        ({"base": "x", "a_expert_format": "chat"}, "a_expert_format=chat is given without a_exp"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProxyTuneLM(**arguments)


def test_what_cannot_be_done_is_refused(triple):
    lm = ProxyTuneLM(generator=triple, progress=False)

    def ask(settings):
        return lm.generate_until(requests("generate_until", [("a", settings)]))

    with pytest.raises(ValueError, match="num_beams=4 cannot be done"):
        ask({"until": [], "num_beams": 4})
    with pytest.raises(ValueError, match="max_gen_toks"):
        ask({"until": [], "max_gen_toks": 4096})
    with pytest.raises(ValueError, match="per member"):
        lm.chat_template("llama2")


def test_repeats_of_a_sampled_request_differ_and_come_again(triple):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("Natalia", dict(settings))]) * 3
    runs = [ProxyTuneLM(generator=triple, progress=False).generate_until(asked) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


# -- lm-eval's tasks in an experiment --------------------


def test_a_task_gives_our_records_with_lm_evals_numbers(triple, tmp_path):
    task = LmEvalTask("tiny_choice", include_path=str(TASKS))
    task.check()
    result = task.run(triple, tmp_path, "proxy")
    own = evaluation.evaluate(
        triple, "tiny_choice", cache=tmp_path / "again", include_path=str(TASKS)
    )["results"]["tiny_choice"]
    found = {m.metric: m for m in result.metrics}
    assert found["acc"].value == own["acc,none"] and found["acc"].n == 4
    assert found["acc"].stderr == own["acc_stderr,none"]
    assert {m.system for m in result.metrics} == {"proxy"}
    assert sum(s.values["acc"] or 0 for s in result.scores) / 4 == found["acc"].value
    assert result.infos["acc"].percent and result.infos["acc"].higher_is_better
    first = result.scores[0]
    assert first.target == "0" and first.answer in (" Paris", " April", " 42")
    assert (first.answer == " Paris") == bool(first.values["acc"])
    assert all((m.ci_low or 0) >= 0 and (m.ci_high or 0) <= 1 for m in result.metrics)
    assert task.finished(tmp_path, None) and not task.finished(tmp_path, 2)
    assert task.result(tmp_path) == result
    with pytest.raises(ValueError, match="stage=all"):
        task.result(tmp_path / "empty")


def test_a_perplexity_is_no_share_and_no_mean(triple, tmp_path):
    result = LmEvalTask("tiny_perplexity", include_path=str(TASKS)).run(triple, tmp_path, "base")
    assert {m.metric for m in result.metrics} == {"word_perplexity", "bits_per_byte"}
    info = result.infos["word_perplexity"]
    assert not info.percent and not info.higher_is_better
    assert not result.scores


def test_a_killed_run_goes_on(triple, tmp_path, monkeypatch):
    task = LmEvalTask("tiny_choice", include_path=str(TASKS))
    monkeypatch.setattr("proxytune.harness.model._BLOCK", 4)
    real, calls = triple.loglikelihood, []

    def dies(pairs, **settings):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(pairs, **settings)

    monkeypatch.setattr(triple, "loglikelihood", dies)
    with pytest.raises(KeyboardInterrupt):
        task.run(triple, tmp_path, "proxy")
    task.run(triple, tmp_path, "proxy")
    assert calls == [4, 4, 4, 4]  # twelve requests; eight were kept


def test_an_unknown_task_is_refused_with_close_names(monkeypatch):
    own = TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(evaluation, "_task_manager", lambda *_: own)
    with pytest.raises(ValueError, match=r"no task 'tiny_chioce'; did you mean tiny_choice"):
        LmEvalTask("tiny_chioce").check()


def task_file(folder: Path, dataset: str, **settings: str) -> str:
    """A folder with one task of lm-eval on a dataset, in a group of its own."""
    lines = {"task": "strange", "dataset_path": dataset, "test_split": "test"} | settings
    lines |= {"output_type": "loglikelihood", "doc_to_text": "q", "doc_to_target": "a"}
    folder.mkdir()
    (folder / "strange.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    (folder / "all.yaml").write_text("group: strangers\ntask: [strange]\n")
    return str(folder)


@pytest.mark.parametrize(
    ("named", "asked"),
    [
        ("folder", "strange"),
        ("file", "strange"),
        pytest.param("folder", "strangers", marks=pytest.mark.slow),
    ],
)
def test_a_dataset_that_is_a_script_is_refused_in_one_line(tmp_path, asked, named):
    """Fails on 538a493 with datasets' RuntimeError and its traceback."""
    script = tmp_path / "old" / "old.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('run')\n")
    dataset = str(script if named == "file" else script.parent)
    folder = task_file(tmp_path / "tasks", dataset, dataset_name="main")
    with pytest.raises(UserError, match=r"scripts are no longer supported.*include_path") as said:
        LmEvalTask(asked, include_path=folder).check()
    text = str(said.value)
    assert text.startswith("lm-eval's task strange") and f"its dataset {dataset} (main)" in text
    assert ("(of strangers)" in text) == (asked == "strangers") and "\n" not in text


@pytest.mark.slow
def test_math_tasks_say_what_they_need_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # not installed
    with pytest.raises(UserError, match=r"math500_verify.*pip install 'proxytune\[math\]'") as told:
        evaluation.check_task("math500_verify", str(TASKS))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"antlr4-python3-runtime 4\.11, and Hydra needs 4\.9"):
        evaluation.check_task("minerva_math500")


def test_a_grader_of_latex_is_found_without_running_it():
    """lm-eval's leaderboard_math loads without its parser, and fails after all was generated."""
    from types import FunctionType, SimpleNamespace

    def grade():
        return {}

    latex = FunctionType(grade.__code__, {"parse_latex": None})
    tasks = [SimpleNamespace(config=SimpleNamespace(process_results=f)) for f in (latex, grade)]
    assert [evaluation._parses_latex(task) for task in tasks] == [True, False]


def test_math500_is_graded_by_math_verify():
    pytest.importorskip("math_verify", reason="pip install 'proxytune[math]'")
    from proxytune.harness.tasks.grading import process_results

    doc = {"solution": "So it is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$"}
    right = "Let me see. The answer is \\boxed{(3, \\pi/2)}."
    assert process_results(doc, [right]) == {"math_verify": 1}
    for wrong in ("\\boxed{(3, \\pi/3)}", "It is three.", ""):
        assert process_results(doc, [wrong]) == {"math_verify": 0}


@pytest.mark.slow
def test_lm_evals_own_command_says_it_in_one_line_too(tmp_path, folders, monkeypatch, capsys):
    """Fails on 538a493 with datasets' RuntimeError and its traceback."""
    script = tmp_path / "old" / "old.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('run')\n")
    folder = task_file(tmp_path / "tasks", str(script.parent), dataset_name="main")
    base = f"base={folders['base']}"
    command = ["run", "--model", "proxytune", "--model_args", base, "--tasks", "strange"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *command, "--include_path", folder])
    with pytest.raises(SystemExit) as ended:
        guarded(harness_command.main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert (
        last.startswith("error: lm-eval's task strange: its dataset") and "scripts are no" in last
    )


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "hf auth login"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "choose another task"),
        (ValueError("a/b contains custom code: pass trust_remote_code=True\nmore"), "no script"),
        (OfflineModeIsEnabled("Cannot reach a/b: offline mode is enabled."), "once while the hub"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "no script"),
        (KeyError("test"), "choose another task"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_refused_in_one_line(tmp_path, monkeypatch, error, way_out):
    """The last two fail on 538a493; the others name no dataset there."""
    folder = task_file(tmp_path / "tasks", "a/b")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(UserError, match=rf"task strange: its dataset a/b .*{way_out}") as said:
        LmEvalTask("strange", include_path=folder).check()
    assert "\n" not in str(said.value)


def test_a_fault_in_a_tasks_own_code_keeps_its_traceback(tmp_path):
    folder = Path(task_file(tmp_path / "tasks", "a/b", custom_dataset="!function own.load"))
    (folder / "own.py").write_text("def load(**_):\n    return {}[0]\n")
    with pytest.raises(KeyError):
        LmEvalTask("strange", include_path=str(folder)).check()


def test_generating_alone_checks_another_harness_first(tmp_path, monkeypatch, capsys):
    """On 538a493 `stage=generate` looked at lm-eval's task after the models had loaded."""
    from proxytune import cli

    settings = ["experiment=none", "triple=pocket", "name=x", "stage=generate"]
    words = [*settings, "task=lm_eval/tiny_chioce", f"output_dir={tmp_path}"]
    own = TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(evaluation, "_task_manager", lambda *_: own)
    monkeypatch.setattr("proxytune.experiment.checks.check_models", lambda _: pytest.fail("late"))
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit):
        cli.run()
    assert "did you mean tiny_choice" in capsys.readouterr().err


def test_any_task_composes_without_a_file():
    from hydra import compose, initialize_config_dir

    from proxytune.config.schema import register, to_dict

    register()

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "experiment=none",
                "task=[lm_eval/arc_easy,gsm8k]",
                "task.lm_eval_arc_easy.num_fewshot=5",
            ],
        )
    tasks = to_dict(cfg.task)
    assert list(tasks) == ["lm_eval_arc_easy", "gsm8k"]
    assert tasks["lm_eval_arc_easy"]["task"] == "arc_easy"
    assert tasks["lm_eval_arc_easy"]["num_fewshot"] == 5


@pytest.mark.slow
def test_the_documented_command_evaluates_a_triple(folders, tmp_path):
    arguments = ",".join(f"{role}={folder}" for role, folder in folders.items())
    command = [sys.executable, "-m", "proxytune.harness", "run", "--model", "proxytune"]
    command += ["--model_args", f"{arguments},alpha=1.0", "--tasks", "tiny_choice"]
    command += ["--include_path", str(TASKS), "--device", "cpu", "--batch_size", "auto"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout
