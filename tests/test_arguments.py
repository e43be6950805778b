"""What `load` and `generate` refuse: one clear line, before anything is generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_model

import proxytune

NAN = float("nan")
WRONG: list[tuple[str, list[Any]]] = [
    ("batch_size", [True, 0, 2.5, "2", None]),
    ("n", [True, 0, 1.5, "2", None]),
    ("max_new_tokens", [True, 0, 2.5, "3", None]),
    ("top_k", [True, -1, 1.5, "3", None]),
    ("temperature", [True, -1, NAN, float("inf"), "0.5", None, torch.tensor(0.5)]),
    ("top_p", [True, 0, 1.5, NAN, "1", None]),
    ("seed", [True, None, "x", 1.5]),
    ("speculative", ["yes", 0, -1, 2.5, None]),
    ("record", [-1, "x", 2.5]),
    ("stop", ["", ["a", ""], 5, [5], b"x"]),
    ("banned", [5, [5], "", ["a", ""]]),
]
CASES = [(name, value) for name, values in WRONG for value in values]
PROMPTS: list[Any] = [
    "one string",
    {"base": [3]},
    None,
    5,
    iter([[3]]),
    [[]],
    [None],
    [5],
    [[1.5]],
    [[True, False]],
    [torch.tensor([True, False])],
    [["a", "b"]],
    [[10**6]],
    [[-1]],
    [{"base": [3], "expert": [3]}],
    [{"base": "a", "expert": "b", "antiexpert": "c"}],
    [[{"content": "a message without a role"}]],
    [[{"role": "user", "content": "hi"}, "hello"]],
    [[5] * 600],
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    base = save_tiny(tmp_path_factory.mktemp("base"), arch="llama", seed=0)
    expert, antiexpert = (tiny_model("llama", seed, layers=1) for seed in (1, 2))
    return proxytune.load(base, expert, antiexpert)


def models() -> Mapping[str, Any]:
    return {role: tiny_model("llama", i) for i, role in enumerate(("base", "expert", "antiexpert"))}


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda case: repr(case)[:20])
def test_a_wrong_setting_is_named(generator, name, value):
    with pytest.raises(ValueError, match=name):
        generator.generate([[3, 4]], **{"max_new_tokens": 2, name: value})


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: repr(prompts)[:20])
def test_a_wrong_prompt_is_refused(generator, prompts):
    with pytest.raises(ValueError, match=r"prompt|role"):
        generator.generate(prompts, max_new_tokens=2)


def test_numbers_and_ids_of_other_libraries_are_taken(generator):
    want = generator.generate([[3, 4]], max_new_tokens=4, temperature=0.5, n=2, seed=7)
    got = generator.generate(
        (np.array([3, 4]),),
        max_new_tokens=np.int64(4),
        temperature=np.float64(0.5),
        n=np.int32(2),
        seed=np.int64(7),
        batch_size=np.int64(2),
        speculative=np.int64(2),
    )
    assert [g.token_ids for g in got] == [g.token_ids for g in want]
    (tensor,) = generator.generate([torch.tensor([3, 4])], max_new_tokens=4)
    assert tensor.token_ids == generator.generate([[3, 4]], max_new_tokens=4)[0].token_ids


@pytest.mark.parametrize("alpha", [True, NAN, float("inf"), "1", None])
def test_alpha_is_a_finite_number(alpha):
    with pytest.raises(ValueError, match="alpha"):
        proxytune.load(**models(), alpha=alpha)


def test_what_load_refuses():
    model = tiny_model("llama", 0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": None}, "needs a base"),
        ({"base": 5}, "cannot load 5"),
        ({"base": ""}, "named by a folder"),
        ({"base": model, "expert": model}, "both an expert and an antiexpert"),
        ({**models(), "draft": model}, "own expert drafts"),
        ({"base": "no/such/model"}, "no/such/model"),
        ({"base": "somewhere", "dtype": "float8"}, "float8"),
        ({"base": "somewhere", "device": "gpu"}, "'gpu' is no device"),
        ({"base": "somewhere", "device": "cuda:99"}, "no device cuda:99"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            proxytune.load(**arguments)


def test_a_folder_may_be_a_path(tmp_path):
    folder = Path(save_tiny(tmp_path / "model", arch="llama", seed=0))
    assert proxytune.load(folder).generate([[3]], max_new_tokens=2)
