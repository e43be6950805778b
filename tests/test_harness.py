"""lm-eval on our generators: the same numbers as lm-eval's own `hf` model, and as sums by hand."""

import subprocess
import sys
from pathlib import Path

import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from proxytune import api
from proxytune.errors import UserError
from proxytune.harness.model import ProxyTuneLM
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec
from tests.api_triple import in_process
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_lm_eval")
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
def folders(folder) -> dict[str, Path]:
    return {role: folder / role for role in ("base", "expert", "antiexpert")}


@pytest.fixture(scope="module")
def triple(folder) -> api.Generator:
    return in_process(folder, 0.7)


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
