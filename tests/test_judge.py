"""Local judges on small models that were really trained, by the code that runs the big ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tasks import judge as judge_module
from tasks.judge import SequenceClassifier, YesNoJudge
from tasks.judgements import JudgeError, cached
from tests.tiny import tiny_config, tiny_tokenizer

SAFE = ["we like cats", "she sold clips", "add two and two", "Paris is a city"]
TOXIC = ["we hate cats", "she hates clips", "hate two and two", "Paris hates a city"]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory) -> Path:
    """A RoBERTa of one layer that learnt to call "hate" toxic (label 1)."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 40
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        id2label={0: "fine", 1: "toxic"},
        label2id={"fine": 0, "toxic": 1},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = RobertaForSequenceClassification(config)
    batch = tokenizer(SAFE + TOXIC, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = torch.tensor([0] * len(SAFE) + [1] * len(TOXIC))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TRUE_PROMPTS = [f"Q: {q}\nA: Paris\nTrue:" for q in ("Where?", "Which city?", "What?")]
FALSE_PROMPTS = [f"Q: {q}\nA: April\nTrue:" for q in ("Where?", "Which city?", "What?")]


@pytest.fixture(scope="module")
def yes_no_folder(tmp_path_factory) -> Path:
    """A Llama of one layer that learnt to say " yes" to Paris and " no" to April."""
    folder = tmp_path_factory.mktemp("yes_no")
    tokenizer = tiny_tokenizer(chat_template=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", layers=1))
    texts = [p + " yes" for p in TRUE_PROMPTS] + [p + " no" for p in FALSE_PROMPTS]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.thinned(1)
def test_the_classifier_finds_the_toxic_texts(classifier_folder, tmp_path):
    judge = SequenceClassifier(str(classifier_folder), cache=str(tmp_path / "j.sqlite"))
    judge.check()
    probs = judge([*SAFE, *TOXIC, ""])
    assert all(p < 0.5 for p in probs[:4]) and all(p > 0.5 for p in probs[4:8])
    assert 0 <= probs[8] <= 1


@pytest.mark.slow
def test_the_other_label_by_name_is_the_complement(classifier_folder):
    toxic = SequenceClassifier(str(classifier_folder), cache=None)
    fine = SequenceClassifier(str(classifier_folder), cache=None, label="fine")
    together = zip(toxic(SAFE + TOXIC), fine(SAFE + TOXIC), strict=True)
    assert all(a + b == pytest.approx(1, abs=1e-6) for a, b in together)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("label", ["rude", 2, -1])
def test_a_label_that_the_model_lacks_is_refused(classifier_folder, label):
    with pytest.raises(ValueError, match="has no label"):
        SequenceClassifier(str(classifier_folder), cache=None, label=label)(["a"])


def test_a_label_is_looked_for_before_anything_is_generated(classifier_folder):
    SequenceClassifier(str(classifier_folder), label="toxic").check()
    with pytest.raises(ValueError, match="has no label 'rude'"):
        SequenceClassifier(str(classifier_folder), label="rude").check()


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"dtype": "float23"}, {"device": "gpu"}])
def test_a_setting_that_cannot_be_is_refused_before_anything_is_generated(
    classifier_folder, setting
):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}="):
        SequenceClassifier(str(classifier_folder), **setting).check()


@pytest.mark.slow
def test_a_checkpoint_without_the_judges_head_does_not_judge(classifier_folder, yes_no_folder):
    """transformers fills what is missing with random weights, and they have an opinion too."""
    with pytest.raises(JudgeError, match=r"no LlamaForSequenceClassification: it has no score"):
        SequenceClassifier(str(yes_no_folder), cache=None)(["a"])
    with pytest.raises(JudgeError, match="it has no lm_head"):
        YesNoJudge(str(classifier_folder), cache=None)(["a"])


def test_a_model_of_one_output_is_no_classifier(tmp_path):
    RobertaConfig(id2label={0: "x"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one label"):
        SequenceClassifier(str(tmp_path), label=0).check()


@pytest.mark.slow
def test_what_is_not_a_number_is_no_judgement(classifier_folder, tmp_path):
    model = RobertaForSequenceClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        model.classifier.out_proj.bias.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match="not numbers"):
        SequenceClassifier(str(tmp_path), cache=None)(["a"])


@pytest.mark.slow
def test_odd_texts_are_judged(classifier_folder, yes_no_folder):
    odd = ["", "\ud83d", "\x00", "x" * 50_000]
    for judge in (SequenceClassifier(str(classifier_folder)), YesNoJudge(str(yes_no_folder))):
        assert all(0 <= p <= 1 for p in replace(judge, cache=None)(odd))


@pytest.mark.slow
def test_batching_changes_no_judgement(classifier_folder):
    texts = SAFE + TOXIC + ["a much longer text than the others, which pads them all"]
    one = SequenceClassifier(str(classifier_folder), cache=None, batch_size=1)(texts)
    all_at_once = SequenceClassifier(str(classifier_folder), cache=None, batch_size=64)(texts)
    assert one == pytest.approx(all_at_once, abs=1e-6)


def test_a_long_text_loses_its_end(classifier_folder):
    judge = SequenceClassifier(str(classifier_folder), cache=None)
    start = "she sold clips to friends " * 10  # more than 40 tokens
    plain, hateful = judge([start, start + TOXIC[0]])
    assert plain == hateful


def test_the_yes_no_judge_knows_right_from_wrong(yes_no_folder, tmp_path):
    judge = YesNoJudge(str(yes_no_folder), cache=str(tmp_path / "j.sqlite"))
    probs = judge([*TRUE_PROMPTS, *FALSE_PROMPTS])
    assert all(p > 0.5 for p in probs[:3]) and all(p < 0.5 for p in probs[3:])


def test_the_probability_is_that_of_every_token_of_yes(yes_no_folder):
    """By hand: one prompt at a time, no padding, the product over the answer's tokens."""
    tokenizer = tiny_tokenizer(chat_template=None)
    model = AutoModelForCausalLM.from_pretrained(yes_no_folder)
    prompts = [TRUE_PROMPTS[0], FALSE_PROMPTS[1], "True:"]
    expected = []
    for prompt in prompts:
        before = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + " yes")["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0]
        assert ids.shape[1] - before > 1
        chain = [log_probs[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1])]
        expected.append(torch.tensor(chain).sum().exp().item())
    found = YesNoJudge(str(yes_no_folder), cache=None)(prompts)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_judged_prompts_need_no_model(yes_no_folder, tmp_path, monkeypatch):
    judge = YesNoJudge(str(yes_no_folder), cache=str(tmp_path / "j.sqlite"))
    first = judge(TRUE_PROMPTS)

    class NoModel:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise AssertionError("a judged prompt loaded the model")

    monkeypatch.setattr(judge_module, "AutoModelForCausalLM", NoModel)
    assert judge(TRUE_PROMPTS) == first
    with pytest.raises(AssertionError):
        judge(FALSE_PROMPTS)


@pytest.mark.slow
def test_a_judge_that_fails_keeps_what_it_judged(yes_no_folder, tmp_path, monkeypatch):
    judge = YesNoJudge(str(yes_no_folder), cache=str(tmp_path / "j.sqlite"), batch_size=1)
    real = judge_module._continuation_log_probs
    calls = []

    def fails_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(judge_module, "_continuation_log_probs", fails_at_the_third)
    with pytest.raises(JudgeError, match=r"CUDA out of memory.*kept"):
        judge(TRUE_PROMPTS)
    assert len(judge(TRUE_PROMPTS)) == 3
    assert len(calls) == 4  # two were kept, one was made again


def test_a_missing_judge_is_found_out_before_anything_is_generated(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*stage=generate"):
        YesNoJudge(str(tmp_path / "nowhere")).check()


def test_the_judge_and_its_revision_are_part_of_the_key(tmp_path):
    path = str(tmp_path / "j.sqlite")

    def says(value):
        return lambda prompts: iter([dict.fromkeys(prompts, value)])

    assert cached(path, {"id": "a", "revision": None}, ["p"], says(1)) == [1]
    assert cached(path, {"id": "a", "revision": "v2"}, ["p"], says(2)) == [2]
    assert cached(path, {"id": "a", "revision": None}, ["p", "q", "p"], says(3)) == [1, 3, 1]


def test_odd_prompts_are_kept(tmp_path):
    prompts = ["", "\ud800", "\x00", "é" * 100_000]
    calls = []

    def judge(missing):
        calls.append(missing)
        yield {p: len(p) for p in missing}

    for _ in range(2):
        assert cached(str(tmp_path / "j"), {"id": "x"}, prompts, judge) == [0, 1, 1, 100_000]
    assert len(calls) == 1


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "j.sqlite"
    path.write_text("this is no database, " * 100)
    with pytest.raises(JudgeError, match=r"j\.sqlite cannot be read.*cache="):
        cached(str(path), {}, ["p"], lambda _: iter([{"p": 1}]))
