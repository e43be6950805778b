"""Several pairs in a triple's file: runs, lm-eval's tasks, the server's loading, refusals.

All of it fails on 538a493, whose triples have one pair.
"""

import json
from pathlib import Path

import pytest

import proxytune
from proxytune import cli
from tests.commands import call

MODELS = Path(proxytune.__file__).parents[1] / "pocket" / "models"
TASK = ["task=[pocket_triviaqa]", "limit=4", "report=false", "systems=[base,proxy]"]
BASE = "base: {id: '${root}/pocket/models/base', dtype: float32}\n"


def pair(name: str, fmt: str = "chat", alpha: str = "null") -> str:
    models = "${root}/pocket/models"
    return (
        f"  {name}:\n"
        f"    expert: {{id: '{models}/expert', dtype: float32, format: {{kind: {fmt}}}}}\n"
        f"    antiexpert: {{id: '{models}/antiexpert', dtype: float32}}\n"
        f"    alpha: {alpha}\n"
    )


def run(folder: Path, text: str, *arguments: str):
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(BASE + "pairs:\n" + text)
    given = [f"triple={folder / 'mine.yaml'}", f"output_dir={folder / 'out'}", *TASK]
    return call(cli.run, *given, *arguments)


def rows(folder: Path) -> list[dict]:
    path = folder / "pocket_triviaqa" / "proxy" / "completions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_pairs_add_up_in_a_run(tmp_path):
    both = run(tmp_path / "both", pair("math", alpha="0.6") + pair("chat", fmt="raw"), "alpha=0.4")
    assert both.returncode == 0, both.stderr
    out = tmp_path / "both" / "out"
    cell = json.loads((out / "pocket_triviaqa" / "proxy" / "cell.json").read_text())
    roles = ("math_expert", "math_antiexpert", "chat_expert", "chat_antiexpert")
    assert cell["members"].keys() == {"base", *roles}
    assert cell["alpha"] == {"math": 0.6, "chat": 0.4}
    assert cell["members"]["math_expert"]["format"]["kind"] == "chat"
    assert json.loads((out / "run.json").read_text())["models"].keys() == {"base", *roles}
    assert rows(out)[0]["prompt_sha256"].keys() == {"base", *roles}
    # two half pairs of one skill are the pair: the alphas sum to 1
    halves = run(tmp_path / "halves", pair("a", alpha="0.5") + pair("b"), "alpha=0.5")
    assert halves.returncode == 0, halves.stderr
    plain = call(cli.run, "triple=pocket", f"output_dir={tmp_path / 'plain'}", *TASK)
    assert plain.returncode == 0, plain.stderr
    texts = [
        [row["text"] for row in rows(f)] for f in (tmp_path / "halves/out", tmp_path / "plain")
    ]
    assert texts[0] == texts[1]
    changed = run(tmp_path / "halves", pair("a", alpha="0.7") + pair("b"), "alpha=0.5")
    assert "holds completions of another configuration (alpha" in changed.stderr


@pytest.mark.slow
def test_a_pair_on_the_command_line_and_a_trace(tmp_path):
    more = "triple.pairs.more"
    models = "pocket/models"
    done = run(
        tmp_path,
        pair("a"),
        f"{more}.expert.id={models}/expert",
        f"{more}.antiexpert.id={models}/antiexpert",
        f"{more}.expert.dtype=float32",
        f"{more}.antiexpert.dtype=float32",
        f"{more}.alpha=0.0",
        "decoding=traced",
        "report=true",
    )
    assert done.returncode == 0, done.stderr
    top = rows(tmp_path / "out")[0]["extra"]["trace"][0]["top"]
    assert {"system", "base", "a_expert", "more_antiexpert"} <= top.keys()
    assert "a expert:" in (tmp_path / "out" / "report.html").read_text()


REFUSED = {
    "systems=[expert]": "the triple has no expert",
    "triple.pairs.a.expert=null": "triple.pairs.a.expert",
    "triple.pairs.aa.alpha=0.5": "the triple has no aa_expert (did you mean a_expert?); give one",
    "formula=gated": "none of the triple's pairs (a); use a triple without pairs",
    "engine=vllm": "engine=vllm",
    "triple.pairs.a.expert.id=/nowhere": "/nowhere",
    "triple.pairs.a.alpha=inf": "alpha of a must be a finite number",
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("setting", REFUSED)
def test_what_pairs_cannot_do_is_refused_in_a_line(tmp_path, setting):
    done = run(tmp_path, pair("a"), setting)
    assert done.returncode == 1
    assert REFUSED[setting] in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_formula_of_one_pair_does_not_pass_several_over(tmp_path):
    given = [f"triple.{role}.id=pocket/models/{role}" for role in ("expert", "antiexpert")]
    done = run(tmp_path, pair("a"), "formula=gated", *given)
    assert done.returncode == 1
    assert "combines the base with expert, antiexpert, and with none of" in done.stderr


def test_a_pair_without_a_usable_name_is_refused(tmp_path):
    done = run(tmp_path, pair("a_b"))
    assert done.returncode == 1
    assert "a pair's name has small letters and digits: 'a_b'" in done.stderr
