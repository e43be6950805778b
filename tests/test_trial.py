"""`proxytune check` on pocket triples. There was no such command at 538a493: these fail there."""

import json
import re
from pathlib import Path

import pytest

import proxytune
from proxytune import cli
from proxytune.engine.speculation import promised
from proxytune.experiment.costs import StepTimes, confirmed
from proxytune.files import ROOT
from tests.commands import call
from tests.tiny import save_tiny

MODELS = ROOT / "pocket" / "models"
OVERTUNED = f"triple.expert.id={MODELS / 'overtuned'}"
ONE_ALPHA = ["alphas=[]", "machine=cpu"]


def check(folder: Path, *arguments: str):
    return call(cli.main, "check", "triple=pocket", f"output_dir={folder}", *arguments)


def verdicts(done) -> list[str]:
    assert done.returncode == 0, done.stderr
    words = ("helps: ", "hurts: ", "cannot tell with ")
    return [line for line in done.stdout.splitlines() if line.startswith(words)]


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """A check of the shipped triple with the default scan, and its folder."""
    folder = tmp_path_factory.mktemp("helped")
    return check(folder, "task=pocket_gsm8k", "limit=12"), folder


@pytest.mark.slow
def test_a_triple_that_helps(helped):
    done, folder = helped
    (verdict,) = verdicts(done)
    assert re.match(r"helps: at alpha=1 accuracy of pocket_gsm8k rises from 0\.0 to \d", verdict)
    assert done.stdout.rstrip().endswith(verdict)
    assert verdict.endswith("on 12 examples.")
    for said in ("vocabulary: 1,506 tokens", "memory: weights 4.1 MB", "seconds per token, 1 row"):
        assert said in done.stdout
    stored = json.loads((folder / "check.json").read_text())
    (task,) = stored["tasks"]
    assert task["verdict"] == verdict and task["available"] == 150
    assert list(task["alphas"]) == ["0.25", "0.5", "1.0", "1.5", "2.0"]
    assert all(0 < share < 0.5 for share in task["changed"].values())
    assert all(0.5 < share < 1 for share in task["confirmed"].values())
    assert task["gain"]["ours"] >= task["gain"]["theirs"] == 0


@pytest.mark.slow
def test_the_shares_are_those_of_a_trace(helped):
    """The counts at drafted and undrafted steps equal what a lockstep trace lists."""
    _, folder = helped
    lines = (folder / "pocket_gsm8k" / "proxy" / "alpha=1.0" / "completions.jsonl").read_text()
    stored = {each["example_id"]: each for each in map(json.loads, lines.splitlines())}
    out = folder / "traced"
    run = ["task=[pocket_gsm8k]", "limit=4", "systems=[proxy]", "report=false"]
    done = call(cli.run, *run, "decoding=traced", f"output_dir={out}")
    assert done.returncode == 0, done.stderr
    traced = (out / "pocket_gsm8k" / "proxy" / "completions.jsonl").read_text().splitlines()
    for each in map(json.loads, traced):
        trace, own = each["extra"]["trace"], stored[each["example_id"]]
        assert own["token_ids"] == each["token_ids"]
        for role in ("base", "expert", "antiexpert"):
            right = sum(entry["top"][role][0][0] == entry["id"] for entry in trace)
            assert own["extra"]["agreed"][role] == right
        assert own["extra"]["agreed"]["system"] == len(trace)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("speculative", [False, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_agrees_where_it_would_draw_the_same_token(speculative, temperature):
    """At alpha 0 the triple is its base; with an expert that is the base, it is the expert."""
    base, small = str(MODELS / "base"), str(MODELS / "antiexpert")
    settings = {"max_new_tokens": 12, "temperature": temperature, "ignore_eos": True}
    prompts = ["Question: ", "In spring "]
    for expert, alpha, same in ((small, 0.0, ["base"]), (base, 0.0, ["base", "expert"])):
        triple = proxytune.load(base, expert, small, alpha=alpha, dtype="float32")
        found = triple.generate(prompts, speculative=speculative, compare=True, **settings)
        for each in found:
            assert [each.extra["agreed"][role] for role in same] == [12] * len(same)
            assert each.extra["agreed"]["system"] == 12
            if temperature:
                assert each.extra["agreed"]["antiexpert"] < 12


@pytest.mark.slow
def test_a_triple_that_hurts(tmp_path):
    """The over-tuned expert of docs/pocket.md still helps at alpha 1; twice its push does harm."""
    asked = ["task=pocket_triviaqa", "limit=null", "alpha=2.0", "alphas=[0.5]", "machine=cpu"]
    done = check(tmp_path, OVERTUNED, *asked)
    (verdict,) = verdicts(done)
    assert verdict.startswith(
        "hurts: at alpha=2 exact match of pocket_triviaqa falls from 28.5 to "
    )
    assert "on 200 examples; alpha=0.5 helps (+" in verdict


@pytest.mark.parametrize(
    ("expert", "task", "available", "enough"),
    [("expert", "truthfulqa_mc", 120, True), ("antiexpert", "gsm8k", 150, False)],
)
@pytest.mark.slow
def test_twenty_examples_that_cannot_tell(expert, task, available, enough, tmp_path):
    """Multiple choice rises by too little for so few; an untuned expert changes nothing."""
    kind = "raw" if expert == "antiexpert" else "chat"
    member = [f"triple.expert.id={MODELS / expert}", f"triple.expert.format.kind={kind}"]
    done = check(tmp_path, f"task=pocket_{task}", "limit=20", *member, *ONE_ALPHA)
    (verdict,) = verdicts(done)
    assert verdict.startswith("cannot tell with 20 examples: at alpha=1 accuracy")
    needed = int(re.findall(r"about ([\d,]+) examples would tell", verdict)[0].replace(",", ""))
    assert needed > 20 and (needed <= available) == enough
    assert f"(the task has {available})" in verdict


@pytest.mark.slow
def test_a_check_goes_on_and_takes_no_other_triple(helped):
    """More examples keep the completions so far; another expert's are refused."""
    _, folder = helped
    path = folder / "pocket_gsm8k" / "proxy" / "alpha=0.5" / "completions.jsonl"
    before = path.read_text()
    path.write_text("\n".join(before.splitlines()[:5]) + "\n")
    done = check(folder, "task=pocket_gsm8k", "limit=12")
    assert sorted(path.read_text().splitlines()) == sorted(before.splitlines())
    assert len(verdicts(done)) == 1
    done = check(folder, "task=pocket_gsm8k", "limit=12", OVERTUNED)
    assert done.returncode == 1 and "holds completions of another configuration" in done.stderr


@pytest.mark.slow
def test_several_tasks_and_one_of_lm_eval(tmp_path):
    own = f"task.lm_eval_tiny_choice.include_path={ROOT / 'tests' / 'lm_eval_tasks'}"
    tasks = "task=[pocket_toxigen,lm_eval/tiny_choice]"
    done = check(tmp_path, tasks, own, "limit=6", *ONE_ALPHA)
    toxic, choice = verdicts(done)
    assert toxic.startswith("helps: at alpha=1 toxic of pocket_toxigen falls from 100.0 to 0.0")
    assert "lm_eval_tiny_choice" in choice and "the task has" not in choice
    _, other = json.loads((tmp_path / "check.json").read_text())["tasks"]
    assert other["changed"] == {"1.0": None}


@pytest.mark.slow
def test_a_formula_without_expert_and_a_base_behind_an_api(tmp_path):
    done = check(
        tmp_path / "contrastive",
        "task=pocket_toxigen",
        "limit=3",
        "formula=contrastive",
        *ONE_ALPHA,
    )
    assert len(verdicts(done)) == 1
    assert "expert minus" not in done.stdout
    api = "triple.base.api={base_url: local, model: b, top_logprobs: 20}"
    done = check(tmp_path / "api", "task=pocket_toxigen", "limit=3", api, *ONE_ALPHA)
    assert len(verdicts(done)) == 1
    assert "not measured, for the base runs on a server" in done.stdout


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task=pocket_gsm9k"], "unknown task 'pocket_gsm9k'"),
        ([], "no task chosen"),
        (["task=pocket_gsm8k", "alphas=[1.0,nan]"], "alphas=nan"),
        (["task=pocket_gsm8k", "alpha=inf"], "alphas=inf"),
        (["task=pocket_gsm8k", "limit=0"], "limit=0"),
        (["task=pocket_gsm8k", "triple.expert.id=/nowhere"], "/nowhere"),
        (["task=pocket_gsm8k", "triple=null"], "a group of conf/ cannot be null"),
        (["task=pocket_gsm8k", "engine=vllm"], "engine=own"),
        (["task=pocket_gsm8k", "sistems=[base]"], "unknown key 'sistems'"),
        (["task=pocket_gsm8k", "formula=gated", "formula.threshold=2"], "threshold"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path):
    done = check(tmp_path, *arguments)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_folders_are_named_by_triples(tmp_path, monkeypatch):
    monkeypatch.setattr("proxytune.experiment.trial.ROOT", tmp_path)
    models = [f"triple.{role}.id={MODELS / role}" for role in ("base", "expert", "antiexpert")]
    for triple in (["triple=pocket"], models):
        done = call(cli.main, "check", *triple, "task=pocket_toxigen", "limit=2", *ONE_ALPHA)
        assert len(verdicts(done)) == 1
    folders = sorted(path.name for path in (tmp_path / "results" / "checks").iterdir())
    assert folders == ["base expert antiexpert", "pocket"]


def test_one_that_is_incompatible_is_refused_before_weights(tmp_path):
    save_tiny(tmp_path / "other")
    done = check(tmp_path / "out", "task=pocket_gsm8k", f"triple.expert.id={tmp_path / 'other'}")
    assert done.returncode == 1 and "vocabular" in done.stderr


def test_what_drafting_promises():
    assert promised(0.0, {1: 1.0, 4: 1.2}) == (1, 1.0)
    width, gain = promised(1.0, {1: 1.0, 4: 1.0})
    assert (width, gain) == (9, 9.0)
    assert StepTimes(1, 1.0, 1.0).gain(0.9) == (1, 1.0)
    assert StepTimes(1, 1.0, 1.0, 1.0).gain(0.5)[1] == pytest.approx(2, abs=0.01)
    assert confirmed([{"system": 4, "expert": 1}, {"system": 6, "expert": 4}], "expert") == 0.5
    assert confirmed([{"system": 0}], "expert") is None
