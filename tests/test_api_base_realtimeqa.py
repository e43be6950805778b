"""RealTimeQA with a base that shows its five likeliest words only, by the experiment's files."""

import json
import math

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from proxytune import api
from proxytune.config.schema import register
from proxytune.experiment.runner import run_experiment
from proxytune.files import ROOT, read_jsonl
from proxytune.records import Completion
from tests.api_triple import over_http
from tests.openai_server import openai_server

pytestmark = pytest.mark.usefixtures("impatient")

PROBE = 4  # requests
PROBED = {  # what the stand-in says to the probe's texts
    "The capital of France is": {"Paris": -0.2, "A": -2.5, "the": -3.0, "a": -4.0, "in": -5.0},
    "The": {"A": -1.2, "The": -1.5, "I": -2.0, "How": -3.0, "What": -4.0},
    " 1, 2, 3, 4, 5, 6,": {"7": -0.1, "A": -3.0, "8": -4.0, "The": -5.0, "9": -6.0},
}
QUESTIONS = {
    "Which show was renewed?": {"A": -0.4, " B": -1.6, "The": -2.3, "C": -6.0, "I": -7.0},
    "Who won the race?": {" D": -0.2, "D": -1.9, "B": -4.0, "Some": -5.0, "It": -6.0},
    "What fell from the sky?": {"I": -0.1, "As": -3.0, "Sorry": -4.0, "The": -5.0, "My": -6.0},
    "Which bank closed?": {"C": -0.75, "A": -0.85, "B": -3.1, "D": -3.2, "None": -9.0},
}


def answer(body):
    """What the stand-in says: the question's words, one token."""
    text = body["messages"][0]["content"]
    words = next((w for q, w in QUESTIONS.items() if q in text), None)
    words = words or PROBED.get(text) or QUESTIONS["Which bank closed?"]
    listed = [
        {"token": word, "logprob": logprob, "bytes": list(word.encode())}
        for word, logprob in sorted(words.items(), key=lambda each: -each[1])
    ][: body["top_logprobs"]]
    return {
        "message": {"role": "assistant", "content": listed[0]["token"]},
        "logprobs": {"content": [listed[0] | {"top_logprobs": listed}]},
    }


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    """Two weekly files of RealTimeQA's form."""
    past = tmp_path_factory.mktemp("past")
    for week, questions in (("20220617", [*QUESTIONS][:2]), ("20220624", [*QUESTIONS][2:])):
        rows = [
            {
                "question_id": f"{week}_{number}",
                "question_date": f"{week[:4]}/{week[4:6]}/{week[6:]}",
                "question_sentence": question,
                "choices": ["One", "Two", "Three", "Four"],
                "answer": ["0"],
            }
            for number, question in enumerate(questions)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (past / f"{week}_qa.jsonl").write_text(text)
    return past


def experiment(folder, weeks, output, url: str):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            "config",
            [
                "experiment=gpt35_realtimeqa",
                "machine=cpu",
                f"triple.base.id={folder / 'base'}",
                f"triple.base.api.base_url={url}",
                f"triple.expert={{id: {folder / 'expert'}, dtype: float32}}",
                f"triple.antiexpert={{id: {folder / 'antiexpert'}, dtype: float32}}",
                f"task.realtimeqa.path={weeks}",
                f"output_dir={output}",
                "alpha=0.2",
                "systems=[base,proxy]",
                "report=false",
            ],
        )


@pytest.mark.slow
def test_options_alone_are_re_weighed_and_out_of_reach_is_excluded(
    folder, weeks, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with openai_server(answer) as server:
        cfg = experiment(folder, weeks, tmp_path, server.url)
        metrics = {(m.system, m.metric): m for m in run_experiment(cfg)}
        asked = len(server.requests)
        assert server.keys == {"Bearer secret"}
        assert {body["top_logprobs"] for body in server.requests[PROBE:]} == {5}
        run_experiment(cfg)
        assert len(server.requests) == asked  # everything was kept
    assert asked == PROBE + 4  # one request per question for both systems
    for system in ("base", "proxy"):
        assert metrics[system, "acc"].n == 3
        assert metrics[system, "acc_all"].n == 4
    done = {
        system: list(read_jsonl(tmp_path / "realtimeqa" / system / "completions.jsonl", Completion))
        for system in ("base", "proxy")
    }
    for completions in done.values():
        by_id = {c.example_id: c for c in completions}
        excluded = by_id["20220624_0"]
        assert (excluded.text, excluded.finish_reason) == ("", "nothing")
        assert excluded.extra["api"]["flagged"] == [0]
        assert by_id["20220617_0"].extra["api"]["k"] == 5
        assert all(c.text.strip() in "ABCD" for c in completions)
    base = {c.example_id: c.text.strip() for c in done["base"]}
    assert base == {"20220617_0": "A", "20220617_1": "D", "20220624_0": "", "20220624_1": "C"}
    assert {c.example_id: c.text.strip() for c in done["proxy"]} == by_hand(folder, tmp_path)


def by_hand(folder, output) -> dict[str, str]:
    """The formula over the listed letters, from the two small models."""
    expert, antiexpert = (api.load(str(folder / name)) for name in ("expert", "antiexpert"))
    found = {}
    for line in (output / "realtimeqa" / "examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        prompt = example["prompt"]["raw"]
        ids = expert.encode(prompt)["base"]
        shift = (expert.logits(ids) - antiexpert.logits(ids))[-1]
        words = next(w for q, w in QUESTIONS.items() if q in prompt)
        scores = {}
        for letter in "ABCD":
            listed = [lp for word, lp in words.items() if word.strip() == letter]
            if listed:
                token = letter_id(letter)
                mass = math.log(sum(map(math.exp, listed)))
                scores[letter] = mass + 0.2 * float(shift[token])
        found[example["id"]] = max(scores, key=lambda each: scores[each]) if scores else ""
    return found


def letter_id(letter: str) -> int:
    """The token that writes a letter behind a space, or the letter alone where there is none."""
    from tests.tiny import tiny_tokenizer

    vocab = tiny_tokenizer().get_vocab()
    return vocab.get(f"Ġ{letter}", vocab[letter])


@pytest.mark.slow
def test_a_spent_budget_keeps_what_is_finished(folder, weeks, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with openai_server(answer) as server:
        cfg = experiment(folder, weeks, tmp_path, server.url)
        cfg.decoding.batch_size = 1
        cfg.triple.base.api.max_requests = PROBE + 2
        with pytest.raises(ValueError, match=r"max_requests=6 is spent .*the same command goes on"):
            run_experiment(cfg)
        path = tmp_path / "realtimeqa" / "base" / "completions.jsonl"
        assert len(path.read_text().splitlines()) == 2
        cfg.triple.base.api.max_requests = PROBE + 4
        assert {m.n_examples for m in run_experiment(cfg)} == {4}
        assert len(server.requests) == PROBE + 4


@pytest.mark.slow
def test_a_chat_endpoint_cannot_go_on(folder, weeks, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with openai_server(answer) as server:
        cfg = experiment(folder, weeks, tmp_path, server.url)
        cfg.decoding.max_new_tokens = 3
        with pytest.raises(ValueError, match="can only be asked for a first token"):
            run_experiment(cfg)
        assert len(server.requests) == PROBE
        remote = over_http(folder, server.url, endpoint="chat", top_logprobs=5)
        with pytest.raises(ValueError, match="can only be asked for a first token"):
            remote.generate(["x"], max_new_tokens=3)
