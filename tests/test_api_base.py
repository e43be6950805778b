"""A base over HTTP against the same base in one process."""

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from proxytune import api
from proxytune.config.schema import register
from proxytune.experiment.identity import system_identity
from proxytune.files import ROOT
from tests.api_triple import PROMPTS, client_of, in_process, over_http, served
from tests.faulty import faulty

pytestmark = pytest.mark.usefixtures("impatient")
GREEDY: dict[str, Any] = {"max_new_tokens": 10}
SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "n": 2, "seed": 3}
FILTERED: dict[str, Any] = SAMPLED | {"top_p": 0.9, "top_k": 30}


@pytest.fixture(scope="module")
def local(folder) -> api.Generator:
    return in_process(folder)


def offer_of(generator: api.Generator) -> Any:
    base: Any = generator.members["base"].member
    return base.offer


def ids(generations) -> list[list[int]]:
    return [each.token_ids for each in generations]


@pytest.fixture
def seconds(monkeypatch) -> None:
    """Seconds of a block that are the same on a busy machine: a list of prompts is slow."""
    given = {"prompts": 1.0, None: 0.001}
    monkeypatch.setattr(
        "proxytune.members.api.blocks._seconds", lambda _, offer, *__: given.get(offer.blocks, 0.1)
    )


@pytest.mark.thinned(1)
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "T", "filters"])
@pytest.mark.parametrize("blocks", [True, False])
def test_full_log_probs_give_the_tokens_of_one_process(folder, local, url, blocks, decoding):
    remote = over_http(folder, url, top_logprobs=-1, blocks=blocks)
    prompts, short = PROMPTS[1:], decoding | {"max_new_tokens": 5}
    got = remote.generate(prompts, **short)
    assert ids(got) == ids(local.generate(prompts, **short))
    for each in got:
        assert each.extra["api"]["k"] == -1
        assert each.extra["api"]["flagged_steps"] == 0
        assert each.extra["api"]["max_unseen_mass"] < 1e-5


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("refused", "blocks", "token_ids"),
    [
        ((), "prompt_logprobs", True),
        (("prompt_logprobs",), "echo", True),
        (("prompt_logprobs", "echo"), None, True),
        (("prompt_logprobs", "return_tokens_as_token_ids"), "echo", False),
    ],
)
def test_whatever_a_server_lacks_is_found_out_and_done_without(
    folder, local, url, refused, blocks, token_ids, seconds
):
    want = local.generate(PROMPTS, **GREEDY)
    with faulty(url, refuse=refused) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=40)
        offer = offer_of(remote)
        assert (offer.endpoint, offer.k, offer.blocks) == ("completions", 40, blocks)
        assert offer.token_ids is token_ids
        got = remote.generate(PROMPTS, **GREEDY)
    assert any(each.extra["api"]["flagged_steps"] == 0 for each in got) or not token_ids
    for mine, theirs in zip(got, want, strict=True):
        same_up_to_a_flag(mine, theirs)


def test_auto_takes_the_most_that_is_granted(folder, seconds):
    with served(folder, max_logprobs=7, prompt_logprobs=False) as url:
        offer = offer_of(over_http(folder, url))
        assert (offer.k, offer.blocks) == (5, None)  # of 100, 50, 20, 10, 5, ...
        with pytest.raises(ValueError, match="top_logprobs=9"):
            over_http(folder, url, top_logprobs=9)


def same_up_to_a_flag(mine, theirs) -> int | None:
    """Checks that completions agree before the first flagged step; returns where they part."""
    flagged = mine.extra["api"]["flagged"]
    pairs = zip([*mine.token_ids, None], [*theirs.token_ids, None], strict=False)
    parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert parted is None or parted in flagged, (parted, flagged)
    return parted


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("k", "decoding"),
    [(2, GREEDY), (20, GREEDY), (5, SAMPLED), (2, FILTERED), (20, FILTERED)],
)
def test_with_a_few_tokens_every_difference_is_flagged(folder, local, url, k, decoding):
    remote = over_http(folder, url, top_logprobs=k)
    got, want = (each.generate(PROMPTS, **decoding) for each in (remote, local))
    for mine, theirs in zip(got, want, strict=True):
        parted = same_up_to_a_flag(mine, theirs)
        if parted is not None and decoding is GREEDY:
            # and only because the token was not among those that the server lists
            context = [*local.encode(PROMPTS[mine.prompt_index])["base"], *mine.token_ids[:parted]]
            rows = api.load(str(folder / "base")).logits(context)[-1]
            assert theirs.token_ids[parted] not in rows.topk(k).indices.tolist()
    steps = sum(each.extra["api"]["steps"] for each in got)
    flagged = sum(each.extra["api"]["flagged_steps"] for each in got)
    assert steps > 0
    if k == 2:
        assert flagged, "two of 300 tokens must leave a doubt somewhere"
        assert any(
            mine.token_ids != theirs.token_ids for mine, theirs in zip(got, want, strict=True)
        )
    if k == 20 and decoding is GREEDY:
        assert flagged < steps, "a proof must succeed somewhere"


@pytest.mark.slow
def test_blocks_and_single_tokens_give_the_same_from_a_few_tokens(folder, url):
    generators = [over_http(folder, url, top_logprobs=5, blocks=b) for b in (True, False)]
    one, other = (each.generate(PROMPTS, **GREEDY) for each in generators)
    assert ids(one) == ids(other)
    flags = [[each.extra["api"]["flagged"] for each in every] for every in (one, other)]
    assert flags[0] == flags[1]


@pytest.mark.slow
def test_an_agreeing_expert_saves_requests(folder, url):
    """Expert and antiexpert the same as the base: every drafted token is right."""
    counts = []
    for blocks in (True, False):
        base = over_http(folder, url, alpha=0.0, top_logprobs=20, blocks=blocks)
        expert = api.load(str(folder / "base")).members["base"]
        remote = api.load(base.members["base"], expert, expert, alpha=0.0)
        before = client_of(remote).spent.requests
        got = remote.generate(PROMPTS[:2], max_new_tokens=40)
        counts.append(client_of(remote).spent.requests - before)
    assert counts[1] == sum(each.extra["api"]["steps"] for each in got) > 40
    assert counts[0] * 3 < counts[1]


def test_the_first_request_scores_the_first_block(folder, url):
    base = over_http(folder, url, top_logprobs=20)
    expert = api.load(str(folder / "base")).members["base"]
    remote = api.load(base.members["base"], expert, expert, alpha=0.0)
    before = client_of(remote).spent.requests
    remote.generate(PROMPTS[:1], max_new_tokens=4)
    assert client_of(remote).spent.requests == before + 1


def test_log_likelihoods_need_every_token(folder, local, url):
    context, continuation = "The answer", [40, 50, 60]
    full = over_http(folder, url, top_logprobs=-1)
    got = full.loglikelihood([(context, continuation)])[0]
    want = local.loglikelihood([(context, continuation)])[0]
    assert got[0] == pytest.approx(want[0], abs=1e-4)
    assert got[1] == want[1]
    one, other = (each.logits([40, 50, 60]).log_softmax(-1) for each in (full, local))
    assert torch.allclose(one, other, atol=1e-4)
    with pytest.raises(ValueError, match="likeliest only"):
        over_http(folder, url, top_logprobs=5).loglikelihood([(context, continuation)])


def test_the_base_alone_works_too(folder, url):
    remote = over_http(folder, url, top_logprobs=3)
    single = api.load(remote.members["base"])
    got = single.generate(PROMPTS, **GREEDY)
    assert ids(got) == ids(api.load(str(folder / "base")).generate(PROMPTS, **GREEDY))
    assert all(each.extra["api"]["flagged_steps"] == 0 for each in got)


def test_a_draft_model_saves_requests_for_a_single_base(folder, url):
    base = over_http(folder, url, top_logprobs=20).members["base"]
    drafted = api.load(base, draft=str(folder / "base"))
    before = client_of(drafted).spent.requests
    got = drafted.generate(PROMPTS[:1], max_new_tokens=12)
    assert ids(got) == ids(api.load(str(folder / "base")).generate(PROMPTS[:1], max_new_tokens=12))
    assert got[0].extra["api"]["flagged_steps"] == 0
    assert client_of(drafted).spent.requests - before <= 3


def test_what_completions_depend_on_leaves_out_where_the_base_is():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain, moved, other = (
            compose("config", ["experiment=gpt35_realtimeqa", *more])
            for more in (
                [],
                ["triple.base.api.base_url=http://elsewhere/v1", "triple.base.api.max_cost=3"],
                ["triple.base.api.top_logprobs=20"],
            )
        )
    one, same, different = (system_identity(cfg, "proxy") for cfg in (plain, moved, other))
    assert one == same
    assert one != different
    assert one["members"]["base"]["api"]["model"] == "gpt-3.5-turbo-0613"
    assert "api_key_env" not in one["members"]["base"]["api"]
