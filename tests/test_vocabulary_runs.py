"""Vocabularies from the command lines, and on the pocket models with other tokenizers.

All of it fails on 538a493, which knew no such setting.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import proxytune
from proxytune import cli
from proxytune.harness.model import ProxyTuneLM
from proxytune.loading.loaded import LoadedModel
from tests.commands import call
from tests.vocabularies import coarser, finer, read_pocket, renamed, resized, save

MODELS = Path(proxytune.__file__).parents[1] / "pocket" / "models"
TASK = ["task=[pocket_triviaqa]", "limit=4", "report=false", "systems=[base,proxy]"]
QUESTIONS = [
    "Question: What is the food of Doufer?\nAnswer:",
    "Question: Ana has 12 boxes and gets 31 more. How many boxes does Ana have?\nAnswer:",
    "def add(x):\n    return x + 12",
]


@pytest.fixture(scope="module")
def pocket():
    """Role -> model, tokenizer."""
    return {role: read_pocket(role, MODELS) for role in ("base", "expert", "antiexpert")}


@pytest.fixture(scope="module")
def folders(pocket, tmp_path_factory):
    """The expert with other special tokens, and expert and antiexpert with digits as words."""
    folder = tmp_path_factory.mktemp("vocabularies")
    names = {"<pad>": "<|pad|>", "<s>": "<|begin|>", "</s>": "<|end|>"}
    model, tokenizer = pocket["expert"]
    found = {"renamed": save(folder / "renamed", model, renamed(tokenizer, names))}
    for role in ("expert", "antiexpert"):
        model, tokenizer = pocket[role]
        made, rows = finer(tokenizer)
        found[role] = save(folder / role, resized(model, rows), made)
    return found


def texts(folder: Path) -> dict[str, str]:
    path = folder / "pocket_triviaqa" / "proxy" / "completions.jsonl"
    return {r["example_id"]: r["text"] for r in map(json.loads, path.read_text().splitlines())}


def run(folder: Path, *arguments: str):
    return call(cli.run, *TASK, f"output_dir={folder}", *arguments)


@pytest.mark.slow
def test_an_expert_with_other_special_tokens_writes_the_same(folders, tmp_path):
    expert = f"triple.expert.id={folders['renamed']}"
    refused = run(tmp_path / "refused", expert)
    assert refused.returncode == 1
    assert "special tokens alone differ: vocabulary=special" in refused.stderr
    plain = run(tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    done = run(tmp_path / "special", expert, "triple.vocabulary=special")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "special") == texts(tmp_path / "plain")
    noted = json.loads((tmp_path / "special" / "run.json").read_text())["vocabulary"]
    assert noted["kind"] == "special"
    assert [(each["id"], each["expert"], each["shifted"]) for each in noted["renamed"]] == [
        (0, "<|pad|>", False),
        (1, "<|begin|>", False),
        (2, "<|end|>", True),
    ]
    again = run(tmp_path / "special", expert, "triple.vocabulary=map")
    assert "holds completions of another configuration (vocabulary" in again.stderr
    cell = json.loads((tmp_path / "plain" / "pocket_triviaqa/proxy/cell.json").read_text())
    assert "vocabulary" not in cell


@pytest.mark.slow
def test_a_run_with_another_vocabulary_reports_what_found_no_counterpart(folders, tmp_path):
    pair = [f"triple.{role}.id={folders[role]}" for role in ("expert", "antiexpert")]
    refused = run(tmp_path / "refused", *pair)
    assert refused.returncode == 1 and "vocabulary=map" in refused.stderr
    done = run(tmp_path, *pair, "triple.vocabulary=map")
    assert done.returncode == 0, done.stderr
    assert "of the base's 1,506 tokens" in done.stderr
    table = pd.read_csv(tmp_path / "table.csv").set_index("metric")
    assert 0 <= table.loc["unshifted_probability", "proxy"] < 100
    cell = tmp_path / "pocket_triviaqa" / "proxy"
    assert json.loads((cell / "cell.json").read_text())["vocabulary"] == "map"
    lines = map(json.loads, (cell / "completions.jsonl").read_text().splitlines())
    assert all(
        line["extra"]["unshifted"].keys() == {"base", "expert", "antiexpert"} for line in lines
    )
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["vocabulary"]["translated"].keys() == {"expert", "antiexpert"}
    other = run(tmp_path / "vllm", *pair, "triple.vocabulary=maps")
    assert "vocabulary='maps' is none of strict, special, map" in other.stderr


def slow(members, tokenizers, text: str, count: int) -> list[int]:
    """Greedy tokens where helpers retokenise the whole text at each step, in float64."""
    base_words = {i: word for word, i in tokenizers[0].get_vocab().items()}
    own_words = tokenizers[1].get_vocab()
    both = [(i, own_words[w]) for i, w in base_words.items() if w in own_words and i not in (0, 3)]
    mine, theirs = (list(each) for each in zip(*both, strict=True))
    ids, out = list(tokenizers[0](text)["input_ids"]), []
    while len(out) < count:
        whole = tokenizers[0].decode(ids[1:])
        with torch.inference_mode():
            logits = members[0](torch.tensor([ids])).logits[0, -1].double()
            own = torch.tensor([tokenizers[1](whole)["input_ids"]])
            expert, anti = (m(own).logits[0, -1].double().log_softmax(-1) for m in members[1:])
            logits[mine] += (expert - anti)[theirs]
        token = int(logits.argmax())
        if token == 2:
            break
        out.append(token)
        ids.append(token)
    return out


@pytest.mark.thinned(1)
@pytest.mark.parametrize("other", [finer, coarser])
def test_the_pocket_family_beside_a_reference_that_retokenises_everything(pocket, other):
    """Where the helpers' words are finer, both read the same; where coarser, nearly so."""
    tokenizer, rows = other(pocket["expert"][1])
    members = [pocket["base"][0], *(resized(pocket[r][0], rows) for r in ("expert", "antiexpert"))]
    tokenizers = [pocket["base"][1], tokenizer, tokenizer]
    both = zip(members, tokenizers, strict=True)
    got = proxytune.load(*(LoadedModel(*each) for each in both), vocabulary="map")
    done = [g.token_ids for g in got.generate(QUESTIONS, max_new_tokens=24, speculative=3)]
    want = [slow(members, tokenizers, question, 24) for question in QUESTIONS]
    if other is finer:
        assert done == want
        assert got.vocabulary.translations["expert"].read(tokenizers[0].get_vocab()["12"]) == (
            tokenizer.get_vocab()["1"],
            tokenizer.get_vocab()["2"],
        )
    else:
        same = sum(
            a == b
            for one, two in zip(done, want, strict=True)
            for a, b in zip(one, two, strict=False)
        )
        assert same >= 0.8 * sum(map(len, want))


def test_lm_eval_and_the_server_take_a_vocabulary(folders):
    names = {"base": str(MODELS / "base")} | {r: folders[r] for r in ("expert", "antiexpert")}
    model = ProxyTuneLM(**names, dtype="float32", vocabulary="map", progress=False)
    context, target = model._encode_pair("Question: What is 12", " + 12")
    ((sum_of_logs, _),) = model._loglikelihood_tokens([(None, context, target)])
    generator = model.generator
    logits = generator.logits(generator.tokenizer("Question: What is 12 + 12")["input_ids"])
    ids = generator.tokenizer("Question: What is 12 + 12")["input_ids"]
    logs = logits.log_softmax(-1)
    first = len(ids) - len(target)
    want = sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))
    assert sum_of_logs == pytest.approx(want, abs=1e-3)
    info = model.get_model_info()
    assert info["proxytune_vocabulary"]["kind"] == "map"
    prompt = generator.encode("Question: What is 12")
    ((first_token, *rated),) = generator.rate(
        [generator.encoder.with_base_ids(prompt)], [None], [0]
    )
    assert first_token is None and len(rated) == len(prompt["base"]) - 1
