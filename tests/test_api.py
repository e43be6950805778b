"""The Python API: prompts of every kind, streaming, callbacks, refusals."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import proxytune
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptFormat
from proxytune.loading.spec import ModelSpec

TOKENIZER = tiny_tokenizer()
MODELS = [tiny_model("llama", seed) for seed in (1, 2, 3)]
GENERATOR = proxytune.load(*MODELS, tokenizer=TOKENIZER)


def test_importing_the_package_is_cheap():
    code = "import proxytune, sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
    assert callable(proxytune.load)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = proxytune.nothing


def test_strings_ids_and_roles_are_the_same_prompt():
    ids = TOKENIZER("The answer")["input_ids"]
    by_role = dict.fromkeys(GENERATOR.roles, ids)
    prompts = ["The answer", ids, torch.tensor(ids).tolist(), by_role]
    got = GENERATOR.generate(prompts, max_new_tokens=8)
    assert len({tuple(each.token_ids) for each in got}) == 1
    assert got[0].finish_reason in ("eos", "length")
    assert GENERATOR.roles == ("base", "expert", "antiexpert")


def test_each_member_renders_chat_messages_for_itself():
    chat = ModelSpec("unused", format=PromptFormat("chat"))
    members = [
        LoadedModel(MODELS[0], TOKENIZER),
        LoadedModel(MODELS[1], TOKENIZER, chat),
        LoadedModel(MODELS[2], TOKENIZER),
    ]
    generator = proxytune.load(*members)
    messages = [{"role": "user", "content": "hi"}]
    ids = generator.encode(messages)
    assert ids["base"] == ids["antiexpert"] == TOKENIZER("hi")["input_ids"]
    rendered = "<s><|user|>\nhi\n<|assistant|>\n"
    assert ids["expert"] == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    got = generator.generate([messages], max_new_tokens=6)
    assert got == generator.generate([ids], max_new_tokens=6)


def test_every_sample_is_handed_over_as_it_ends():
    seen = []
    got = GENERATOR.generate(
        ["a", "b"], n=3, temperature=1.0, max_new_tokens=4, on_finish=seen.append
    )
    assert sorted(seen, key=lambda g: (g.prompt_index, g.sample)) == got
    assert [(g.prompt_index, g.sample) for g in got] == [(i, s) for i in (0, 1) for s in (0, 1, 2)]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("stop", [None, "e", ["zzz", "a"]])
def test_streamed_pieces_make_up_the_text(stop):
    setting = {"max_new_tokens": 30, "temperature": 1.3, "seed": 4}
    want = GENERATOR.generate(["The"], stop=stop, **setting)[0]
    pieces = list(GENERATOR.stream("The", stop=stop, **setting))
    assert "".join(pieces) == want.text
    assert all(pieces)
    assert GENERATOR.system.lengths == []


def test_an_abandoned_stream_leaves_nothing_behind():
    stream = GENERATOR.stream("The", max_new_tokens=30)
    next(stream)
    stream.close()
    assert GENERATOR.system.lengths == []
    assert GENERATOR.generate(["The"], max_new_tokens=3)[0].finish_reason == "length"


def test_a_failed_run_leaves_nothing_behind():
    def fail(generation):
        raise KeyError("disk full")

    with pytest.raises(KeyError):
        GENERATOR.generate(["a", "b", "c"], max_new_tokens=3, on_finish=fail)
    assert GENERATOR.system.lengths == []


def test_choices_and_bans_by_string():
    first = GENERATOR.generate(["The"], max_new_tokens=1, choices=["A", "B", "C"])[0]
    assert first.text in ("A", "B", "C")
    second = GENERATOR.generate(
        ["The"], max_new_tokens=1, choices=["A", "B", "C"], banned_first=[first.text]
    )[0]
    assert second.text in {"A", "B", "C"} - {first.text}
    logits = GENERATOR.logits(TOKENIZER("The")["input_ids"])[-1]
    letters = TOKENIZER.convert_tokens_to_ids(["A", "B", "C"])
    assert first.token_ids == [max(letters, key=lambda i: float(logits[i]))]


def test_a_completion_ends_with_the_context():
    model = tiny_model("gpt2", 1, n_positions=40)
    generator = proxytune.load(model, tokenizer=TOKENIZER)
    got = generator.generate([[1] * 30, [1] * 5], max_new_tokens=500)
    assert [len(each.token_ids) for each in got] == [10, 35] or {"eos"} & {
        each.finish_reason for each in got
    }
    alone = proxytune.load(model, draft=tiny_model("gpt2", 2, n_positions=40))
    longer = alone.generate([[1] * 30, [1] * 5], max_new_tokens=500, speculative=4)
    assert [each.token_ids for each in longer] == [each.token_ids for each in got]
    with pytest.raises(ValueError, match="prompt 1 is 40 tokens long"):
        generator.generate([[1], [1] * 40])


@pytest.mark.parametrize(
    ("prompts", "setting", "message"),
    [
        ("text", {}, r"give \[prompt\]"),
        ([[]], {}, "has no tokens"),
        ([[1, 300]], {}, "token id 300"),
        ([[1, -1]], {}, "token id -1"),
        ([{"base": [1], "expert": [1]}], {}, "roles"),
        (["a"], {"temperature": -1}, "temperature"),
        (["a"], {"top_p": 0}, "top_p"),
        (["a"], {"top_k": -1}, "top_k"),
        (["a"], {"n": 0}, "n "),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens"),
        (["a"], {"stop": [""]}, "stop: a string must not be empty"),
        (["a"], {"batch_size": 0}, "batch_size"),
        (["a"], {"speculative": -2}, "speculative"),
        (["a"], {"choices": ["two words"]}, "no single token"),
        (["a"], {"sample_keys": ["a", "b"]}, "2 sample_keys for 1 prompts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(prompts, setting, message):
    with pytest.raises(ValueError, match=message):
        GENERATOR.generate(prompts, **setting)


def test_stream_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="n=2"):
        next(GENERATOR.stream("a", n=2))
    with pytest.raises(ValueError, match="unknown setting 'top_q'"):
        next(GENERATOR.stream("a", top_q=1))


def test_a_generator_without_a_tokenizer_takes_ids():
    generator = proxytune.load(MODELS[0])
    got = generator.generate([[1, 40]], max_new_tokens=4)[0]
    assert len(got.token_ids) == 4
    assert got.text == ""
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator.generate(["text"])
    with pytest.raises(ValueError, match="stop strings"):
        generator.generate([[1, 40]], stop="a")


def test_no_prompts_no_generations():
    assert GENERATOR.generate([]) == []


@pytest.mark.slow
def test_bfloat16_differs_only_at_near_ties():
    """In bf16 the block and the step may round differently; only near-ties may then differ."""
    models = [tiny_model("llama", seed, dtype=torch.bfloat16) for seed in (1, 2, 3)]
    generator = proxytune.load(*models)
    prompts = [[1, 40 + i, 60 + i] for i in range(12)]
    want = generator.generate(prompts, max_new_tokens=24, speculative=False, batch_size=1)
    margins = []
    for setting in ({"speculative": 4}, {"batch_size": 12, "speculative": False}):
        got = generator.generate(prompts, max_new_tokens=24, **setting)
        for prompt, one, other in zip(prompts, want, got, strict=True):
            pairs = list(zip(one.token_ids, other.token_ids, strict=False))
            at = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
            if at is not None:
                logits = generator.logits([*prompt, *one.token_ids[:at]])[-1]
                margins.append(abs(float(logits[pairs[at][0]] - logits[pairs[at][1]])))
                spread = float(logits.std())
                assert margins[-1] < 0.1 * spread, f"{margins[-1]} of {spread}"
    print("bf16 margins at the differing tokens:", [round(margin, 4) for margin in margins])
