"""No completion, however odd, crashes a scorer, and none gets a value outside 0..1."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.records import Example, Prompt
from tasks.alpaca_eval import AlpacaEval
from tasks.gsm8k import GSM8K
from tasks.realtimeqa import RealTimeQA
from tasks.toxigen import ToxiGen
from tasks.triviaqa import TriviaQA
from tasks.truthfulqa import TruthfulQAMC, TruthfulQAOpen


class Judge:
    def annotate(self, examples, texts):
        return [0.5 for _ in texts]

    def __call__(self, texts):
        return [0.5 for _ in texts]


TASKS = [
    (GSM8K(), Example("0", Prompt("", ""), target="18")),
    (TriviaQA(), Example("0", Prompt("", ""), target=["a"])),
    (TruthfulQAMC(), Example("0", Prompt("", ""), target="A")),
    (
        TruthfulQAOpen(truth_judge=Judge(), info_judge=Judge()),
        Example("0", Prompt("", ""), target="t", row={"question": "q"}),
    ),
    (ToxiGen(classifier=Judge()), Example("0", Prompt("", ""), row={"group": "asian"})),
    (AlpacaEval(judge=Judge()), Example("0", Prompt("", ""), target="r")),
    (RealTimeQA(), Example("0", Prompt("", ""), target="A")),
]
# surrogates stand for bytes that are no UTF-8
odd = st.text(alphabet=st.characters(exclude_categories=())) | st.text(alphabet="0123456789,.-+$ ")
huge = st.sampled_from(["9" * 100_000, "," * 100_000, "1," * 50_000, "\n" * 100_000, "-" * 100_000])


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("task", "example"), TASKS, ids=lambda x: getattr(x, "name", ""))
@settings(max_examples=60, deadline=None)
@given(text=odd | huge | st.just(""))
def test_scorers_take_anything(task, example, text):
    score = task.score(example, [text])
    assert score.example_id == "0"
    for metric, value in score.values.items():
        if metric != "avg_length":
            assert value is None or 0 <= value <= 1
