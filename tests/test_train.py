"""Training: what carries loss, what must not leak, and that nothing depends on how it was run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from proxytune import ModelSpec, load
from proxytune.files import ROOT
from proxytune.training import train as train_module
from proxytune.training.config import LoraSettings, TrainConfig, register
from proxytune.training.data import IGNORE, collate, read_rows, tokenize, turns
from proxytune.training.train import train

WORDS = [f"w{i}" for i in range(60)]
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %} U {{ m.content }} A"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "U", "A", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of uneven length whose answer repeats the prompt's first words."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = []
    for i in range(64):
        words = [WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(2 + i % 9)]
        rows.append({"prompt": " ".join(words), "completion": " " + " ".join(words[: 1 + i % 4])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(model_dir: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_dir),
        data=str(data_file),
        output_dir=str(tmp_path / "out"),
        epochs=1,
        batch_size=32,
        per_device_batch_size=32,
        learning_rate=1e-2,
        precision="float32",
        save_every=None,
        log_every=1,
        progress=False,
    )


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# --- what a model reads and learns ---------------------------------------------------------


def test_loss_is_on_the_answer_and_its_end_only() -> None:
    tokenizer = word_tokenizer()
    row = {"prompt": "w1 w2 w3", "completion": " w4 w5"}
    (example,) = tokenize([row], tokenizer, 100).examples
    prompt_ids = tokenizer("w1 w2 w3")["input_ids"]
    answer_ids = tokenizer(" w4 w5", add_special_tokens=False)["input_ids"]
    assert example["input_ids"] == [*prompt_ids, *answer_ids, tokenizer.eos_token_id]
    assert prompt_ids[0] == tokenizer.bos_token_id
    assert example["labels"] == [IGNORE] * 4 + [*answer_ids, tokenizer.eos_token_id]


def test_a_token_never_straddles_prompt_and_answer() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "bb": 5}
    inner = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "b")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    rows = [{"prompt": "ba", "completion": "bb"}, {"prompt": "ba", "completion": "ab"}]
    data = tokenize(rows, tokenizer, 100)
    # "babb" would be b ab b: the prompt must still read b a, as it does in generation
    assert [e["input_ids"] for e in data.examples] == [[3, 2, 5, 1], [3, 2, 4, 1]]
    assert data.resplit == 1


def test_every_assistant_turn_of_a_chat_is_learned_and_ends() -> None:
    tokenizer = word_tokenizer()
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
    ]
    (example,) = tokenize([{"messages": messages}], tokenizer, 100).examples
    names = tokenizer.convert_ids_to_tokens(example["input_ids"])
    learned = [n if x != IGNORE else "" for n, x in zip(names, example["labels"], strict=True)]
    assert names == ["U", "w1", "A", "w2", "</s>", "U", "w3", "A", "w4", "w5", "</s>"]
    assert learned == ["", "", "", "w2", "</s>", "", "", "", "w4", "w5", "</s>"]


def test_gsm8k_rows_take_the_papers_prompt(shared: Path) -> None:
    rows = read_rows("gsm8k", str(shared / "data/gsm8k/train.jsonl"))
    assert len(rows) == 7473
    (asked, learn_asked), (answer, learn_answer) = turns(rows[0], word_tokenizer())
    assert asked.startswith("Question: Natalia sold clips") and asked.endswith("?\nAnswer:")
    assert answer.startswith(" Natalia sold 48/2 = <<48/2=24>>24") and answer.endswith("#### 72")
    assert (learn_asked, learn_answer) == (False, True)


def test_no_example_sees_another(model_dir: Path, data_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    examples = tokenize(read_rows(str(data_file)), word_tokenizer(), 100).examples[:6]

    def losses(batch: list[dict[str, list[int]]]) -> torch.Tensor:
        tensors = collate(batch)
        with torch.no_grad():
            logits = model(tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tensors["labels"][:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)

    other = {"input_ids": [1] + [9] * 30, "labels": [IGNORE] + [9] * 30}
    together = losses(examples).sum(1)
    beside_another = losses([*examples[:-1], other]).sum(1)
    alone = torch.stack([losses([e]).sum() for e in examples])
    assert torch.allclose(together[:-1], beside_another[:-1], atol=1e-5)
    assert torch.allclose(together, alone, atol=1e-5)


# --- the same weights, however it is run ---------------------------------------------------


def plain_loop(model: torch.nn.Module, config: TrainConfig) -> list[float]:
    """What training means, in plain PyTorch; returns the loss of each step."""
    tokenizer = word_tokenizer()
    examples = tokenize(read_rows(config.data), tokenizer, config.max_length).examples
    steps = len(examples) // config.batch_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    warmup = -(-int(steps * config.warmup * 1000) // 1000)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    losses = []
    model.train()
    for step in range(steps):
        batch = collate(examples[step * config.batch_size : (step + 1) * config.batch_size])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.thinned(1)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_same_losses_as_a_plain_loop(config: TrainConfig, method: str) -> None:
    lora = LoraSettings(rank=4, alpha=16, dropout=0.0)
    config = replace(
        config, method=method, lora=lora, order="sequential", batch_size=8, per_device_batch_size=8
    )
    model = train_module._load_model(config)
    expected = plain_loop(model, config)
    record = train(config)
    found = [loss for _, loss in record["loss_curve"]]
    assert len(found) == 8
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_gradient_accumulation_is_exact(config: TrainConfig) -> None:
    """The loss is a mean over the whole batch's answer tokens, however it is cut up."""
    train(config)
    whole = weights(config.output_dir)
    parts = replace(config, output_dir=config.output_dir + "4", per_device_batch_size=8)
    record = train(parts)
    assert record["gradient_accumulation"] == 4
    # Adam divides by the gradient's own size, so rounding of tiny gradients is amplified
    assert largest_difference(whole, weights(parts.output_dir)) < 2e-5


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(
    config: TrainConfig, model_dir: Path, tmp_path: Path
) -> None:
    dropping = tmp_path / "dropping"  # dropout, so that the random state counts
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attention_dropout=0.1
    )
    model.save_pretrained(dropping)
    word_tokenizer().save_pretrained(dropping)
    config = replace(
        config, model=str(dropping), batch_size=8, per_device_batch_size=4, steps=120, threads=1
    )
    killed = replace(config, output_dir=str(tmp_path / "killed"), save_every=3)
    keys = ("model", "data", "output_dir", "batch_size", "per_device_batch_size", "learning_rate")
    keys += ("steps", "epochs", "precision", "save_every", "log_every", "progress", "threads")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train_expert.py")]
        + [f"{key}={getattr(killed, key)}" for key in keys],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    out = Path(killed.output_dir)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((out / "train.json").read_text())["status"] == "running"
    (out / "checkpoint-119").mkdir(exist_ok=True)  # one that a kill cut short

    before = train_module._last_checkpoint(out)
    assert before is not None and 3 <= int(before.name.split("-")[1]) < 119
    resumed, straight = train(replace(killed, save_every=None)), train(config)
    assert largest_difference(weights(out), weights(config.output_dir)) == 0.0
    assert resumed["tokens"] == straight["tokens"] and resumed["steps"] == 120
    assert not list(out.glob("checkpoint-*"))


def test_a_finished_training_is_not_run_again(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(replace(config, steps=1))
    monkeypatch.setattr(train_module, "_load_model", lambda _: pytest.fail("loaded a model"))
    again = train(replace(config, steps=1, log_every=None))
    assert again == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match=r"another training.*learning_rate: 0\.01 -> 0\.02"):
        train(replace(config, steps=1, learning_rate=0.02))


@pytest.mark.slow
def test_the_record_counts_tokens_and_time(config: TrainConfig) -> None:
    record = train(config)
    stored = json.loads((Path(config.output_dir) / "train.json").read_text())
    assert stored["tokens"] == record["data"]["tokens"]
    lengths = [
        len(e["input_ids"]) for e in tokenize(read_rows(config.data), word_tokenizer(), 99).examples
    ]
    assert record["data"]["tokens"] == sum(lengths)
    assert record["steps"] == 2 and record["epochs"] == 1 and record["seconds"] > 0
    assert record["status"] == "finished" and record["environment"]["versions"]["torch"]


# --- LoRA ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_equals_its_merged_weights(config: TrainConfig) -> None:
    from peft import PeftModel

    config = replace(config, method="lora", lora=LoraSettings(rank=4), learning_rate=0.05)
    merged = replace(
        config, output_dir=config.output_dir + "_merged", lora=replace(config.lora, merge=True)
    )
    train(config)
    train(merged)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    ids = torch.tensor([[1, 9, 10, 11]])
    untuned = base(ids).logits
    adapted = PeftModel.from_pretrained(base, config.output_dir).eval()(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(merged.output_dir, dtype=torch.float32)
    assert not (Path(merged.output_dir) / "adapter_config.json").exists()
    assert (adapted - untuned).abs().max() > 1e-2
    assert torch.allclose(adapted, whole(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_is_an_expert_of_the_model_that_it_adapts(config: TrainConfig) -> None:
    train(replace(config, method="lora", lora=LoraSettings(rank=4), learning_rate=0.05))
    untuned = ModelSpec(config.model, dtype="float32")
    expert = replace(untuned, adapter=config.output_dir)
    ids = [1, 9, 10, 11]
    base_logits = load(untuned).logits(ids)
    expert_logits = load(expert).logits(ids)
    # base == antiexpert: what is left of the triple is the expert
    triple_logits = load(untuned, expert=expert, antiexpert=untuned).logits(ids)
    assert (expert_logits - base_logits).abs().max() > 1e-2
    assert torch.allclose(triple_logits, expert_logits, atol=1e-5)


# --- mistakes, all found before a model is loaded ------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nowhere"}, "no model at ./nowhere"),
        ({"data": "missing.jsonl"}, "no training data at missing.jsonl"),
        ({"data_file": "x.jsonl"}, "data_file goes with data=gsm8k"),
        ({"max_length": 6}, r"\d+ of 64 examples are longer than max_length=6"),
        ({"batch_size": 30}, "batch_size=30 is not a multiple of per_device_batch_size=32"),
        ({"method": "qlora"}, "method=qlora is not one of full, lora"),
        ({"warmup": 100}, "warmup is a share"),
        ({"batch_size": 0}, "batch_size=0: it must be a finite number, 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: it must be"),
        ({"epochs": 0}, "epochs=0 trains nothing"),
        ({"output_dir": "/proc/nowhere"}, "cannot make output_dir=/proc/nowhere"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(train_module, "_load_model", lambda _: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ('{"prompt": "w1"}\n', 'strings "prompt" and "completion"'),
        ('{"prompt": "w1", "completion": " w2"}\n{"prompt":\n', "rows.jsonl:2 is not JSON"),
    ],
)
def test_bad_data_is_refused(
    config: TrainConfig, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        train(replace(config, data=str(path)))


def test_a_folder_of_something_else_is_left_alone(config: TrainConfig) -> None:
    out = Path(config.output_dir)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files of something else"):
        train(config)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_long_examples_can_be_left_out() -> None:
    rows = [{"prompt": "w1", "completion": " w2"}, {"prompt": "w1 " * 50, "completion": " w2"}]
    data = tokenize(rows, word_tokenizer(), 10, too_long="drop")
    assert (len(data.examples), data.dropped) == (1, 1)


# --- configuration -------------------------------------------------------------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("lora", 1e-4)])
def test_the_defaults_are_the_papers(method: str, rate: float) -> None:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["model=m", "data=gsm8k", "output_dir=o", f"train={method}"])
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    assert (config.method, config.learning_rate) == (method, rate)
    assert (config.epochs, config.batch_size, config.max_length) == (2, 128, 2048)
    assert (config.weight_decay, config.warmup, config.schedule) == (0, 0.04, "linear")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16, 0.1)
