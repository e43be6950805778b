"""A server that answers for single tokens by their ids (vLLM's `logprob_token_ids`).

538a493 never asks for them: there, every step flagged here stays flagged.
"""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from proxytune import api
from proxytune.engine.sampling import NOTHING, Sampler
from proxytune.engine.truncation import MAX_ASKED
from proxytune.members.api.distribution import NotLogProbs
from proxytune.members.api.faults import Refused
from proxytune.records import Decoding
from tests.api_triple import PROMPTS, client_of, in_process, over_http, save_triple, served
from tests.faulty import Faulty, faulty

GREEDY: dict[str, Any] = {"max_new_tokens": 10}
SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "n": 2, "seed": 3}
FILTERED: dict[str, Any] = SAMPLED | {"top_p": 0.9, "top_k": 30}
FEW = 3  # tokens listed
ALPHA = 2.0  # so that tokens beyond them win


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_triple(tmp_path_factory.mktemp("triple"))


@pytest.fixture(scope="module")
def local(folder) -> api.Generator:
    return in_process(folder, ALPHA)


@pytest.fixture(scope="module")
def url(folder):
    with served(folder, max_logprobs=-1) as url:
        yield url


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(str(target.hostname), target.port)
    path, headers = f"{target.path}/completions", {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = json.load(connection.getresponse())
    connection.close()
    return answer


def single_tokens(url: str, change=lambda values: values, most: int = MAX_ASKED):
    """What vLLM does: the list of a generated token has the tokens asked for, and its own."""

    def early(body: dict[str, Any]) -> tuple[int, Any] | None:
        wanted = body.get("logprob_token_ids")
        if wanted is None:
            return None
        if len(wanted) > most:
            return 400, {"error": {"message": f"greater than max allowed: {most}"}}
        whole = {key: value for key, value in body.items() if key != "logprob_token_ids"}
        answer = post(url, whole | {"logprobs": -1})
        logprobs = answer["choices"][0]["logprobs"]
        (values,) = logprobs["top_logprobs"]
        names = [logprobs["tokens"][0], *(f"token_id:{token}" for token in wanted)]
        logprobs["top_logprobs"] = [change({name: values[name] for name in names})]
        return 200, answer

    return early


def asked_for(proxy: Faulty) -> list[list[int]]:
    """The tokens of each request for single ones, without the first, the probe's."""
    found = [b["logprob_token_ids"] for b in proxy.asked if "logprob_token_ids" in b]
    return found[1:]


def ids(generations) -> list[list[int]]:
    return [each.token_ids for each in generations]


def flagged(generations) -> int:
    return sum(each.extra["api"]["flagged_steps"] for each in generations)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("blocks", [True, False])
def test_what_a_list_leaves_open_is_asked_for(folder, local, url, blocks, decoding):
    wanted = ids(local.generate(PROMPTS, **decoding))
    plain = over_http(folder, url, ALPHA, top_logprobs=FEW, blocks=blocks)
    before = plain.generate(PROMPTS, **decoding)
    assert flagged(before) > 10 and ids(before) != wanted
    with faulty(url, early=single_tokens(url)) as proxy:
        remote = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW, blocks=blocks)
        got = remote.generate(PROMPTS, **decoding)
        assert flagged(got) < flagged(before) / 4
        if flagged(got) == 0:
            assert ids(got) == wanted
        assert "logprob_token_ids" in got[0].extra["api"]["mode"]
        asked = asked_for(proxy)
        assert asked and max(map(len, asked)) <= MAX_ASKED
    for one, other in zip(got, local.generate(PROMPTS, **decoding), strict=True):
        if one.extra["api"]["flagged_steps"] == 0:
            assert one.token_ids == other.token_ids


@pytest.mark.slow
def test_filters_settle_what_single_tokens_can_settle(folder, local, url):
    wanted = local.generate(PROMPTS, **FILTERED)
    with faulty(url, early=single_tokens(url)) as proxy:
        got = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW).generate(PROMPTS, **FILTERED)
    certain = [
        (one, other)
        for one, other in zip(got, wanted, strict=True)
        if one.extra["api"]["flagged_steps"] == 0
    ]
    assert certain
    assert all(one.token_ids == other.token_ids for one, other in certain)


@pytest.mark.slow
def test_only_what_is_kept_is_asked_for_and_nothing_twice(folder, url, tmp_path):
    cache = str(tmp_path / "api.sqlite")
    with faulty(url, early=single_tokens(url)) as proxy:
        first = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW, cache=cache)
        texts = ids(first.generate(PROMPTS, **GREEDY))
        asked = [tuple(b["prompt"]) for b in proxy.asked if "logprob_token_ids" in b][1:]
        starts = [tuple(first.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
        written = [
            (*start, *text[:n])
            for start, text in zip(starts, texts, strict=True)
            for n in range(len(text) + 1)
        ]
        assert set(asked) <= set(written), "a drafted token that is dropped needs no answer"
        count = len(proxy.asked)
        again = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW, cache=cache)
        assert ids(again.generate(PROMPTS, **GREEDY)) == texts
        assert len(proxy.asked) == count, "offer, lists and single tokens are all in the file"
        assert client_of(again).spent.requests == count


@pytest.mark.slow
def test_the_likeliest_of_many_are_asked_for_and_the_rest_stays_flagged(folder, url, monkeypatch):
    monkeypatch.setattr("proxytune.engine.choice.MAX_ASKED", 4)
    before = over_http(folder, url, ALPHA, top_logprobs=FEW).generate(PROMPTS, **GREEDY)
    with faulty(url, early=single_tokens(url)) as proxy:
        got = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW).generate(PROMPTS, **GREEDY)
        assert max(map(len, asked_for(proxy))) == 4
    assert 0 < flagged(got) < flagged(before)


LISTS: dict[str, Any] = {
    "ignored": {"drop": ("logprob_token_ids",)},
    "refused": {"refuse": ("logprob_token_ids",)},
}
STRANGE: dict[str, Any] = {
    "another scale": lambda values: {name: value / 2 for name, value in values.items()},
    "minus 2": lambda values: {name: value - 2 for name, value in values.items()},
    "positive": lambda values: {name: value + 9 for name, value in values.items()},
    "null": lambda values: dict.fromkeys(values),
    "-9999 but for the listed": lambda values: {
        name: value if value > -4 else -9999.0 for name, value in values.items()
    },
    "NaN": lambda values: values | {[*values][-1]: "NaN"},
    "one is left out": lambda values: dict([*values.items()][:-1]),
    "renormalised": lambda values: {
        name: value - float(torch.tensor(list(values.values())).logsumexp(0)) + 0.9
        for name, value in values.items()
    },
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("kind", [*LISTS, *STRANGE, "fewer"])
def test_a_server_that_answers_otherwise_is_not_asked_for_single_tokens(folder, url, kind):
    behaviour = LISTS.get(kind) or {"early": single_tokens(url, STRANGE.get(kind, lambda v: v))}
    if kind == "fewer":
        behaviour = {"early": single_tokens(url, most=8)}
    with faulty(url, **behaviour) as proxy:
        remote = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW, retry_for_s=3)
        (got,) = remote.generate(PROMPTS[:1], **GREEDY)
        assert asked_for(proxy) == []
    assert "logprob_token_ids" not in got.extra["api"]["mode"]
    assert got.extra["api"]["flagged_steps"] > 0


CHANGED: dict[str, tuple[Any, type[Exception], str]] = {
    "positive": (STRANGE["positive"], NotLogProbs, "for tokens by their ids"),
    "unlisted above listed": (
        lambda values: {name: -1.5 - i / 9 for i, name in enumerate(values)},
        NotLogProbs,
        "sum above 1|more than the last one",
    ),
    "left out": (STRANGE["one is left out"], Refused, "does not answer for"),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("kind", CHANGED)
def test_a_server_that_changes_its_mind_ends_the_run(folder, url, kind):
    change, error, said = CHANGED[kind]
    probed = []

    def later(values):
        probed.append(values)
        return change(values) if len(probed) > 1 else values

    with faulty(url, early=single_tokens(url, later)) as proxy:
        remote = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW, retry_for_s=3)
        with pytest.raises(error, match=said) as caught:
            remote.generate(PROMPTS, **GREEDY)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_minus_infinity_leaves_the_step_flagged(folder, url):
    probed = []

    def later(values):
        probed.append(values)
        return values if len(probed) == 1 else values | dict.fromkeys([*values][1:], -9999.0)

    with faulty(url, early=single_tokens(url, later)) as proxy:
        remote = over_http(folder, proxy.url, ALPHA, top_logprobs=FEW)
        assert flagged(remote.generate(PROMPTS, **GREEDY)) > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rivals_are_the_reason_why_a_choice_is_not_certain(temperature):
    sampler = Sampler(Decoding(max_new_tokens=1, temperature=temperature))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 60, generator=generator)
    ceiling = logits.clone()
    hidden = logits < 0.5
    logits[hidden], ceiling[hidden] = -torch.inf, 0.5
    ceiling += torch.randn(200, 60, generator=generator) * hidden
    streams, positions = list(range(200)), [0] * 200
    chosen = sampler.choose(logits, streams, positions)
    certain = sampler.certain(chosen, logits, ceiling, streams, positions)
    rivals = sampler.rivals(chosen, logits, ceiling, streams, positions) > -torch.inf
    assert torch.equal(certain, ~rivals.any(-1))
    assert 0 < certain.sum() < 200
    lower = ceiling.masked_fill(rivals, -torch.inf)
    assert sampler.certain(chosen, logits, lower, streams, positions).all()


def test_where_no_listed_token_is_allowed_all_others_are_rivals():
    sampler = Sampler(Decoding(max_new_tokens=1), choices=[3, 5])
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 7] = 0.0
    assert sampler.choose(logits, [0], [0]).tolist() == [NOTHING]
    rivals = sampler.rivals(torch.tensor([NOTHING]), logits, torch.zeros(1, 8), [0], [0])
    assert (rivals[0] > -torch.inf).nonzero().flatten().tolist() == [3, 5]
