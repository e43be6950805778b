"""What a server lists must be log-probabilities; everything else is refused, or asked otherwise.

Nearly every case fails on 538a493 (67 of the first 71 when run there): it took lists as they were.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from proxytune import api
from proxytune.errors import UserError
from proxytune.files import ROOT
from proxytune.loading.spec import ModelSpec
from proxytune.members.api import member
from proxytune.members.api.answer import values_of
from proxytune.members.api.distribution import Listed, NotLogProbs, Watch
from proxytune.members.api.names import Named
from proxytune.server import ServerSettings, create_app
from tests import strange_lists as strange
from tests.faulty import faulty
from tests.serving import running

pytestmark = pytest.mark.usefixtures("impatient")
POCKET = ROOT / "pocket" / "models"
QUESTION = (
    "Question: Kim has 8 boxes of 9 drums and gets 3 more. How many drums does Kim have?\nAnswer:"
)


@pytest.fixture(scope="module")
def url():
    base = api.load(str(POCKET / "base"), dtype="float32")
    with running(create_app({"pocket": base}, ServerSettings(max_logprobs=20))) as url:
        yield url


@pytest.fixture(scope="module")
def everything():
    """The same server, which lists the whole vocabulary on request."""
    base = api.load(str(POCKET / "base"), dtype="float32")
    with running(create_app({"pocket": base}, ServerSettings(max_logprobs=-1))) as url:
        yield url


@pytest.fixture(scope="module")
def small():
    """Expert and antiexpert."""
    return [
        api.load(str(POCKET / name), dtype="float32").members[name_of]
        for name, name_of in (("expert", "base"), ("antiexpert", "base"))
    ]


def over(url: str, small, **settings: Any) -> api.Generator:
    member._probed.clear()
    asked = {"base_url": url, "model": "pocket", "retry_for_s": 3} | settings
    return api.load(ModelSpec(str(POCKET / "base"), api=asked), *small, dtype="float32")


def text_of(generator: api.Generator) -> str:
    return generator.generate([QUESTION], max_new_tokens=30, stop="\n\n")[0].text


def offer_of(generator: api.Generator) -> Any:
    base: Any = generator.members["base"].member
    return base.offer


@pytest.fixture(scope="module")
def wanted(url, small) -> str:
    text = text_of(over(url, small))
    assert text.endswith("#### 75")
    return text


CHANGES: dict[str, tuple[Callable[..., Any], str]] = {
    "one-hot, float32's lowest": (strange.one_hot(-3.4028234663852886e38), "probability of 1 for"),
    "one-hot, -9999": (strange.one_hot(-9999.0), "a probability of 1 for one token"),
    "one-hot, -50": (strange.one_hot(-50.0), "the same value .-50. for every token but"),
    "log10": (strange.scaled(1 / math.log(10)), "sum to"),
    "temperature 2 without normalisation": (strange.scaled(0.5), "sum to"),
    "plus 5": (strange.moved(5.0), "above 0"),
    "logits": (strange.moved(20.0), "above 0"),
    "probabilities": (strange.probabilities, "in place of their logarithms"),
    "softmax over the list": (strange.normalised, "sum to (exactly )?1"),
    "top-p, -9999 outside": (strange.nucleus(0.9, -9999.0), "exactly 1|one token"),
    "top-p, the rest left out": (strange.nucleus(0.5, None), "exactly 1"),
    "NaN as a string": (strange.strings("NaN"), "nan"),
    "-inf as a string": (strange.strings("-inf"), "nan"),
    "NaN": (strange.strings(math.nan), "nan"),  # type: ignore[arg-type]
    "infinity": (strange.strings(math.inf), "inf"),  # type: ignore[arg-type]
    "rounded to two decimals": (strange.rounded(2), "rounded to two decimals"),
    "rounded to one": (strange.rounded(1), "rounded to two decimals or fewer"),
    "filled up with -30": (strange.filled(-30.0), "the same value .-30. for the last|hold"),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
def test_other_values_are_refused_by_name_before_anything_is_generated(url, small, kind, blocks):
    change, said = CHANGES[kind]
    with faulty(url, edit=strange.edit(change)) as proxy:
        with pytest.raises(UserError, match=said) as caught:
            over(proxy.url, small, blocks=blocks, top_logprobs=20)
        assert "\n" not in str(caught.value)
        assert "raw_logprobs" in str(caught.value)


SCALES = {
    "log2": strange.scaled(1 / math.log(2)),
    "temperature 0.5 without normalisation": strange.scaled(2.0),
    "minus 3": strange.moved(-3.0),
    "minus 0.5": strange.moved(-0.5),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("k", [20, -1])
@pytest.mark.parametrize("kind", SCALES)
def test_too_small_values_are_refused_by_the_sum_of_the_vocabulary(everything, small, kind, k):
    with (
        faulty(everything, edit=strange.edit(SCALES[kind])) as proxy,
        pytest.raises(NotLogProbs, match="sum to 0"),
    ):
        over(proxy.url, small, top_logprobs=k)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("kind", SCALES)
def test_too_small_values_are_refused_by_what_the_others_can_hold(url, small, kind, blocks):
    """With 20 tokens a position that leaves little open shows it."""
    with (
        faulty(url, edit=strange.edit(SCALES[kind])) as proxy,
        pytest.raises(NotLogProbs, match="unlisted tokens can hold"),
    ):
        text_of(over(proxy.url, small, top_logprobs=20, blocks=blocks))


@pytest.mark.thinned(1)
def test_greedy_sampling_s_list_is_mended_by_asking_at_temperature_1(url, small, wanted):
    """SGLang at temperature 0 lists a one-hot distribution, and the model's own at 1."""
    greedy = strange.edit(strange.one_hot(-9999.0), when=lambda body: body["temperature"] == 0)
    with faulty(url, edit=greedy) as proxy:
        remote = over(proxy.url, small)
        assert offer_of(remote).sampling == "plain"
        assert text_of(remote) == wanted


def test_a_list_that_follows_the_temperature_is_asked_for_at_temperature_1(url, small, wanted):
    """Temperature 0 as 0.01, with normalisation: a possible distribution, but another one."""

    def cold(values):
        return strange.normalised({name: 100 * value for name, value in values.items()})

    edited = strange.edit(cold, when=lambda body: body["temperature"] == 0)
    with faulty(url, edit=edited) as proxy:
        remote = over(proxy.url, small)
        assert offer_of(remote).sampling == "plain"
        assert text_of(remote) == wanted


def test_a_default_filter_is_mended_by_asking_for_none(url, small, wanted):
    """A server whose own top_k is 1 unless the request has another one."""
    filtered = strange.edit(strange.one_hot(-9999.0), when=lambda body: "top_k" not in body)

    with faulty(url, edit=filtered, drop=("top_k", "min_p")) as proxy:
        remote = over(proxy.url, small)
        assert offer_of(remote).sampling == "unfiltered"
        assert text_of(remote) == wanted


@pytest.mark.thinned(1)
@pytest.mark.parametrize("kind", ["one-hot, -9999", "log10", "plus 5", "softmax over the list"])
def test_lists_of_prompts_alone_that_are_wrong_are_not_used(url, small, wanted, kind):
    with faulty(url, edit=strange.edit(CHANGES[kind][0], writes=False)) as proxy:
        remote = over(proxy.url, small)
        assert offer_of(remote).blocks not in ("prompt_logprobs", "echo")
        assert text_of(remote) == wanted


@pytest.mark.thinned(1)
@pytest.mark.parametrize("kind", ["one-hot, -9999", "log10", "plus 5"])
def test_lists_of_generated_tokens_alone_that_are_wrong_are_refused(url, small, kind):
    with (
        faulty(url, edit=strange.edit(CHANGES[kind][0], prompts=False)) as proxy,
        pytest.raises(NotLogProbs),
    ):
        over(proxy.url, small)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("blocks", [True, False])
def test_the_same_list_everywhere_is_refused(url, small, blocks):
    first: list[Any] = []

    def same(values):
        if not first:
            first.append(values)
        return dict(first[0])

    with (
        faulty(url, edit=strange.edit(same)) as proxy,
        pytest.raises(NotLogProbs, match="the same values at different positions"),
    ):
        over(proxy.url, small, blocks=blocks)


def test_the_same_list_along_a_prompt_is_not_used(url, small, wanted):
    def same(body, answer):
        for choice in answer["choices"] if "logprobs" in body else []:
            lists = choice["logprobs"]["top_logprobs"]
            real = next(listed for listed in lists if listed)
            choice["logprobs"]["top_logprobs"] = [listed and real for listed in lists]
        return answer

    with faulty(url, edit=same, refuse=("prompt_logprobs",)) as proxy:
        remote = over(proxy.url, small)
        assert offer_of(remote).blocks != "echo"
        assert text_of(remote) == wanted


@pytest.mark.thinned(1)
@pytest.mark.parametrize("count", [1, 5])
def test_null_is_an_unlisted_token(url, small, wanted, count):
    def nulls(values):
        return values | dict.fromkeys(strange.in_order(values)[-count:])

    with faulty(url, edit=strange.edit(nulls)) as proxy:
        remote = over(proxy.url, small, top_logprobs=20)
        assert offer_of(remote).endpoint == "completions"
        assert text_of(remote) == wanted


def test_null_for_the_likeliest_token_is_flagged(url, small):
    """Its probability is all that the others leave, not that of the last listed one."""

    def null(values):
        return values | {strange.in_order(values)[0]: None}

    with faulty(url) as proxy:
        remote = over(proxy.url, small, top_logprobs=20, blocks=False)
        proxy.edit = strange.edit(null)
        got = remote.generate([QUESTION], max_new_tokens=2)[0]
        assert got.extra["api"]["flagged"]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(
    "kind", ["one-hot, -9999", "log10", "plus 5", "NaN", "softmax over the list", "probabilities"]
)
def test_a_server_that_changes_its_mind_ends_the_run(url, small, kind, blocks):
    with faulty(url) as proxy:
        remote = over(proxy.url, small, blocks=blocks, top_logprobs=20)
        proxy.edit = strange.edit(CHANGES[kind][0])
        prompts = [QUESTION, "Question:", "Question: What", "The capital"]  # open and narrow places
        with pytest.raises(NotLogProbs, match="it did otherwise before: what is finished is kept"):
            remote.generate(prompts, max_new_tokens=20, temperature=1.0)


def test_answers_that_were_stored_untested_are_refused(url, small, tmp_path):
    cache = str(tmp_path / "api.sqlite")
    remote = over(url, small, cache=cache, blocks=False)
    ids = remote.encode(QUESTION)["base"]
    base: Any = remote.members["base"].member
    listed = [Named(0.0, id=5), *(Named(-9999.0, id=i) for i in range(6, 25))]
    from proxytune.members.api.answer import make_answer

    base.store.put(ids, len(ids) - 1, [make_answer(listed, base.protocol.names, -1)])
    with pytest.raises(NotLogProbs, match="delete the file"):
        text_of(remote)


# -- the arithmetic --------------------


def listed(values: Any, k: int | None = None, vocab: int = 50_000, lost: int = 0) -> Listed:
    ordered = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    return Listed(ordered, 0, lost, len(ordered) if k is None else k, vocab)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 20, 100, 50_000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0, 30.0])
def test_no_softmax_is_refused(dtype, k, spread):
    """Flat and sharp distributions, with logits and log-probabilities rounded as servers do."""
    generator = torch.Generator().manual_seed(int(10 * spread) + k)
    watch = Watch()
    for seed in range(20):
        logits = (spread * torch.randn(50_000, generator=generator)).to(dtype)
        for logprobs in (logits.float().log_softmax(-1), logits.float().log_softmax(-1).to(dtype)):
            values = logprobs.float().topk(k).values.double().numpy()
            found = watch.fault(listed(values, k), seed, np.arange(seed, seed + k))
            assert found is None


@pytest.mark.parametrize(
    "values",
    [
        [-0.0] + [-20.0 - i for i in range(19)],  # really certain
        [math.log(p) for p in (0.6, 0.4 - 1e-7)],  # yes or no: a real cliff at the last token
        [math.log(0.25)] * 4,
        [-0.15, -2.4, -5.0, -5.0, -5.0],  # ties of bfloat16
        [math.log(0.001)] * 1 + [math.log(0.0009)] * 4 + [math.log(0.0008)] * 15,
    ],
)
def test_odd_but_possible_lists_pass(values):
    assert listed(values).fault() is None


def test_four_decimals_and_padded_vocabularies_pass():
    logits = 4 * torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    logprobs = logits.log_softmax(-1).topk(20).values.double().numpy()
    assert listed(np.round(logprobs, 4)).fault() is None
    assert listed(np.round(logprobs, 3)).fault() is None
    assert listed(logits.log_softmax(-1).double().numpy()[:49_700], vocab=49_700).fault() is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0] + [-1e9] * 19, None),  # below the floor: see `values_of`
        ([0.0] + [-40.0] * 19, "same value"),
        ([-0.7, -0.7, -1.1], "sum to 1.3"),
        ([-3.0] + [-25.0 - i for i in range(19)], "hold"),
        ([0.2, -5.0], "above 0"),
        ([], "no log-probability"),
    ],
)
def test_impossible_lists_are_named(values, said):
    found = listed(values, 20).fault()
    if said is not None:
        assert found is not None
        assert said in found


def test_floors_count_as_unlisted():
    names = [Named(0.0, id=1), *(Named(-3.4e38, id=i) for i in range(2, 21))]
    values = values_of(names, 20, 300)
    assert (len(values.values), values.floors) == (1, 19)
    assert values.fault() == "a probability of 1 for one token and none for the others"


def test_several_lists_that_sum_to_1_prove_a_filter_and_one_does_not():
    watch = Watch()
    found = []
    for seed in range(4):
        logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
        values = logits.log_softmax(-1).double().numpy()
        found.append(watch.fault(listed(values), seed, np.arange(20)))
    assert found[0] is None
    assert "sum to exactly 1" in str(found[-1])
