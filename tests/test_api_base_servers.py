"""What servers made by others do: prompts as text, their context, errors in a body, names, blocks.

The cases that say so fail on 538a493.
"""

import json
import math
import time
from typing import Any

import pytest

from proxytune import api
from proxytune.errors import Unanswered, UserError
from proxytune.files import ROOT
from proxytune.loading.spec import ModelSpec
from proxytune.members.api import blocks, client, member
from proxytune.members.api.faults import Closed, Failure, Refused, failure_in
from proxytune.members.api.protocol import text_of
from proxytune.server import ServerSettings, create_app
from tests.api_triple import PROMPTS, client_of, in_process, over_http
from tests.faulty import faulty
from tests.serving import running
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("impatient")
POCKET = ROOT / "pocket" / "models"
QUESTION = (
    "Question: Kim has 8 boxes of 9 drums and gets 3 more. How many drums does Kim have?\nAnswer:"
)


@pytest.fixture(scope="module")
def pocket():
    """URL of the pocket family's base, and its expert and antiexpert."""
    small = [
        api.load(str(POCKET / name), dtype="float32").members["base"]
        for name in ("expert", "antiexpert")
    ]
    base = api.load(str(POCKET / "base"), dtype="float32")
    with running(create_app({"pocket": base}, ServerSettings(max_logprobs=20))) as url:
        yield url, small


def over_pocket(url: str, small, **settings: Any) -> api.Generator:
    member._probed.clear()
    asked = {"base_url": url, "model": "pocket", "retry_for_s": 3} | settings
    return api.load(ModelSpec(str(POCKET / "base"), api=asked), *small, dtype="float32")


def offer_of(generator: api.Generator) -> Any:
    base: Any = generator.members["base"].member
    return base.offer


def after(count: int, status: int, body: Any) -> Any:
    """Answers of another server after `count` requests."""
    seen = []

    def early(request: dict[str, Any]) -> tuple[int, Any] | None:
        seen.append(request)
        return (status, body) if len(seen) > count else None

    return early


# -- prompts as text --------------------

NO_IDS = {  # (status, what the server says): llama-cpp-python, lmdeploy #4186, litellm #17118
    "500": "6 validation errors:\n  {'type': 'string_type', 'loc': ('body', 'prompt', 'str')}\n x",
    "422": "Input should be a valid string",
    "400": "prompt must be a string",
}


def no_ids(status: str) -> Any:
    def early(body):
        if isinstance(body.get("prompt"), list):
            return int(status), {"error": {"message": NO_IDS[status]}}
        return None

    return early


@pytest.mark.thinned(1)
@pytest.mark.parametrize("status", NO_IDS)
def test_a_server_that_takes_text_alone_gets_text(pocket, status):
    """Fails on 538a493: 500 was retried for retry_for_s, 400 and 422 ended the run."""
    url, small = pocket
    start = time.monotonic()
    with faulty(url, early=no_ids(status)) as proxy:
        remote = over_pocket(proxy.url, small, retry_for_s=600)
        assert offer_of(remote).text
        got = remote.generate([QUESTION], max_new_tokens=30, stop="\n\n")[0]
    assert got.text.endswith("#### 75")
    assert time.monotonic() - start < 120


def test_tokens_without_a_text_of_their_own_are_refused_in_one_line(folder, url):
    with faulty(url, early=no_ids("400")) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        with pytest.raises(Refused, match="takes text alone, and no text encodes") as error:
            remote.generate([[40, 260, 12, 7, 280]], max_new_tokens=3)
    assert "\n" not in str(error.value)


def test_a_server_that_splits_text_otherwise_is_refused(folder, url):
    def miscounted(body, answer):
        answer["usage"]["prompt_tokens"] += 2
        return answer

    with (
        faulty(url, early=no_ids("400"), edit=miscounted) as proxy,
        pytest.raises(UserError, match=r"reads \d+ tokens in a prompt of \d+"),
    ):
        over_http(folder, proxy.url, top_logprobs=20, endpoint="completions")


def test_names_of_invalid_utf8_do_not_look_like_other_values(folder, url):
    """Tokens that share a text, in lists of another length, over the chat endpoint."""
    assert offer_of(over_http(folder, url, top_logprobs=20, endpoint="chat")).k == 20


def test_text_of_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The answer is 4")["input_ids"]
    assert tokenizer(text_of(ids, tokenizer))["input_ids"] == ids
    longest = max(range(len(ids)), key=lambda i: len(tokenizer.convert_ids_to_tokens(ids[i])))
    letters = list(tokenizer.convert_ids_to_tokens(ids[longest]))
    assert len(letters) > 1
    split = [*ids[:longest], *tokenizer.convert_tokens_to_ids(letters), *ids[longest + 1 :]]
    assert text_of(split, tokenizer) is None


def test_a_server_s_error_is_tried_twice_and_shown_whole(folder, url):
    """Fails on 538a493: retried for retry_for_s, and the first line alone was shown."""
    said = "first line\nsecond line: logits_all must be True\nthird line"
    with (
        faulty(url, early=lambda body: (500, {"error": {"message": said}})) as proxy,
        pytest.raises(UserError, match="first line second line: logits_all must be True third"),
    ):
        over_http(folder, proxy.url, top_logprobs=20, retry_for_s=600)
    sent = [json.dumps(body) for body in proxy.asked]
    assert max(sent.count(body) for body in sent) == 2


# -- the context --------------------

FULL = [
    (400, "This model's maximum context length is 64 tokens. However, you requested 65"),
    (400, "request (65 tokens) exceeds the available context size (64 tokens), try increasing it"),
    (400, "The input (65 tokens) is longer than the model's context length (64 tokens)."),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64"),
    (400, "Requested tokens (65) exceed context window of 64"),
    (500, "Requested tokens (65) exceed context window of 64"),
    (400, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"),  # vLLM 0.32
    (400, "max_completion_tokens must be positive but is -1"),
    (413, "prompt is too long: 65 tokens > 64 maximum"),
    # our own server
    (400, "prompt 0 is 64 tokens long, with 1 to come; the models read at most 64"),
    (200, "Input length 65 exceeds the maximum allowed length of the context"),
]
# Of further servers: TGI, TensorRT-LLM, lmdeploy, llama.cpp, Bedrock, Cohere, Azure, Qwen's.
NO_ROOM = [
    "Input validation error: `inputs` must have less than 60 tokens. Given: 65",
    "The sum of prompt length (60) and max_new_tokens (1) should not exceed max_seq_len (60)",
    "ResponseType.INPUT_LENGTH_ERROR",
    "input is too large to process. increase the physical batch size",
    "Input is too long for requested model.",
    "too many tokens: size limit exceeded by 11 tokens",
    "Please reduce the length of the messages or completion.",
    "Range of input length should be [1, 60]",
    "failed to find a slot in the KV cache",
]
ROOM = [
    "context deadline exceeded",
    "The response was filtered due to the prompt triggering the content management policy",
    "daily limit of 1000000 tokens per day exceeded",
    "Invalid token id 50000, must be less than 32000",
    "prompt must be a string",
    "max_tokens must be greater than 1",
    "logprobs of prompt tokens: at most 5",
    "the queue is full: at most 100 prompts wait",
    "service is overloaded: too many tokens are being read",
]


def test_a_full_context_in_the_words_of_many_servers():
    assert [said for said in NO_ROOM if not Failure(400, "", said).room] == []
    for status in (400, 500):
        assert [said for said in ROOM if Failure(status, "", said).room] == []


@pytest.mark.parametrize(
    ("status", "said", "with_blocks"),
    [*((*each, True) for each in FULL[:2]), *((*each, False) for each in FULL)],
)
@pytest.mark.slow
def test_a_row_that_reaches_the_context_ends_with_length(folder, url, status, said, with_blocks):
    """Fails on 538a493: it ended the run."""
    limit = 30

    def early(body):
        many = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if "echo" not in body and max(map(len, many)) >= limit and full:
            return status, {"error": {"message": said, "code": status if status > 200 else 400}}
        return None

    full: list[int] = []
    prompts = [list(range(40, 60)), list(range(40, 67)), [40, 41]]
    with faulty(url, early=early) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=-1, blocks=with_blocks)
        full.append(1)
        got = remote.generate(prompts, max_new_tokens=14)
    whole = in_process(folder).generate(prompts, max_new_tokens=14)
    assert [len(each.token_ids) for each in got] == [10, 3, 14]
    assert [each.finish_reason for each in got] == ["length"] * 3
    for mine, theirs in zip(got, whole, strict=True):
        assert mine.token_ids == theirs.token_ids[: len(mine.token_ids)]
        assert mine.extra["api"]["steps"] == len(mine.token_ids)


@pytest.mark.parametrize(
    "entry",
    [
        {"meta": {"n_ctx": 64, "n_ctx_train": 8192}},  # llama-server; unknown on 538a493
        {"max_model_len": 64},
        {"context_length": 64},
        {"context_window": 64},
    ],
)
def test_the_context_length_is_read_from_the_list_of_models(entry):
    assert client._context_of({"id": "m"} | entry) == 64


@pytest.mark.parametrize("entry", [{}, {"meta": None}, {"context_length": "64"}])
def test_no_context_length(entry):
    assert client._context_of(entry) is None


# -- errors in a body --------------------

BROKE = [
    {"error": {"message": "Insufficient credits", "code": 402}},
    {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
    {"error": "No credits left on this account"},
    {"choices": [{"error": {"code": 402, "message": "Insufficient balance"}, "text": ""}]},
]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("body", BROKE)
def test_no_money_in_a_body_ends_at_once(folder, url, body):
    """Fails on 538a493: it was asked, and counted, again for 600 s."""
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, max_concurrency=1)
        proxy.early, before = after(2, 200, body), proxy.hits
        with pytest.raises(Closed, match="no money left"):
            remote.generate(PROMPTS, max_new_tokens=8)
        assert proxy.hits <= before + 4  # one may be under way when the third is refused


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "Invalid token", "code": 401}}, "does not accept the key"),
        ({"object": "error", "message": "no such thing", "code": 400}, "refuses: 400, no such"),
        ({"detail": "Model is not for sale"}, "refuses: Model is not for sale"),
    ],
)
def test_other_refusals_in_a_body_end_at_once(folder, url, body, said):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        proxy.early = after(0, 200, body)
        with pytest.raises(UserError, match=said):
            remote.generate(PROMPTS[:1], max_new_tokens=3)


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "Rate limit exceeded", "code": 429}},
        {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
        {"error": {"message": "upstream is overloaded", "code": 503}},
    ],
)
def test_a_rate_limit_in_a_body_is_waited_out(folder, url, body):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20)
        want = remote.generate(PROMPTS[:1], max_new_tokens=3)[0].token_ids
        remote = over_http(folder, proxy.url, top_logprobs=20)
        refused = []

        def early(request):
            refused.append(request)
            return (200, body) if len(refused) < 4 else None

        proxy.early = early
        assert remote.generate(PROMPTS[:1], max_new_tokens=3)[0].token_ids == want


def test_answers_of_no_use_are_not_paid_for_ten_minutes(folder, url):
    with faulty(url) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, retry_for_s=600, max_concurrency=1)
        useless = {"choices": [{"text": "x", "logprobs": None, "index": 0}]}
        proxy.early, before = after(0, 200, useless), proxy.hits
        with pytest.raises(Unanswered, match="gave 5 answers of no use"):
            remote.generate(PROMPTS[:1], max_new_tokens=3)
        assert proxy.hits == before + 5


def test_what_is_no_refusal():
    assert failure_in({"choices": [{"text": "x"}], "error": None}) is None
    assert failure_in("text") is None
    assert not Failure(400, "", "logprobs: at most 20 are allowed").room


# -- the whole vocabulary, and names that coincide --------------------


def test_a_server_that_does_not_know_minus_one_lists_the_vocabulary_by_its_size(folder, url):
    """Fails on 538a493: llama-server answers null to logprobs=-1."""

    def early(body):
        if body.get("logprobs") == -1:
            return 200, {"choices": [{"text": "", "logprobs": None, "index": 0}]}
        return None

    prompts = PROMPTS[1:]
    with faulty(url, early=early) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=-1)
        assert (offer_of(remote).k, offer_of(remote).asked) == (-1, 300)
        assert remote.members["base"].member.complete
        got = remote.generate(prompts, max_new_tokens=4)
    want = in_process(folder).generate(prompts, max_new_tokens=4)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
    assert all(each.extra["api"]["flagged_steps"] == 0 for each in got)


def test_all_tokens_listed_are_the_whole_vocabulary(folder, url):
    remote = over_http(folder, url, top_logprobs=300)
    assert remote.members["base"].member.complete
    assert remote.loglikelihood([("The", [40, 50])])[0][0] < 0


@pytest.mark.thinned(1)
@pytest.mark.parametrize("merged", [1, 3])
def test_foreign_words_that_coincide_are_one_entry(folder, url, merged):
    """Fails on 538a493: "it lists 49 tokens where 50 were asked for"."""

    def edit(body, answer):
        lists = answer["choices"][0]["logprobs"]["top_logprobs"]
        for listed in lists:
            for name in sorted(listed, key=lambda each: listed[each])[:merged]:
                del listed[name]
        return answer

    with faulty(url, edit=edit, drop=("return_tokens_as_token_ids",)) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=50, foreign_tokenizer=True)
        assert offer_of(remote).k == 50


# -- a block as a list of prompts --------------------


def test_a_list_of_prompts_writes_the_same(folder, url, monkeypatch):
    """Prompts of one request that grow by a token: same tokens, same flags."""
    alone = over_http(folder, url, top_logprobs=5, blocks=False)
    want = alone.generate(PROMPTS, max_new_tokens=10)
    before = client_of(alone).spent.requests
    monkeypatch.setattr(blocks, "_fastest", lambda asker, offer, rated, listed: listed)
    with faulty(url, refuse=("prompt_logprobs", "echo")) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=5)
        assert offer_of(remote).blocks == "prompts"
        probed = client_of(remote).spent.requests
        got = remote.generate(PROMPTS, max_new_tokens=10)
        assert client_of(remote).spent.requests - probed < before
    for mine, theirs in zip(got, want, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.extra["api"]["flagged"] == theirs.extra["api"]["flagged"]
        assert mine.extra["api"]["mode"] == "completions, prompts"


def test_a_list_whose_answers_are_all_the_first_one_s_is_not_used(folder, url, monkeypatch):
    monkeypatch.setattr(blocks, "_fastest", lambda asker, offer, rated, listed: listed)

    def edit(body, answer):
        if isinstance(body.get("prompt", [0])[0], list):
            first = answer["choices"][0]["logprobs"]
            for choice in answer["choices"]:
                choice["logprobs"] = first
        return answer

    with faulty(url, refuse=("prompt_logprobs", "echo"), edit=edit) as proxy:
        assert offer_of(over_http(folder, proxy.url, top_logprobs=20)).blocks is None


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"prompt_logprobs": 0.2, "prompts": 0.01, None: 0.01}, "prompt_logprobs"),
        ({"prompt_logprobs": 2.7, "prompts": 0.5, None: 0.4}, "prompts"),
        ({"prompt_logprobs": 2.7, "prompts": 4.0, None: 0.4}, None),
        ({"prompt_logprobs": 2.7, "prompts": 2.4, None: 2.0}, "prompt_logprobs"),
        ({"prompt_logprobs": math.inf, "prompts": 0.5, None: 0.4}, "prompts"),
        ({"prompt_logprobs": math.inf, "prompts": 2.0, None: 0.4}, None),
    ],
)
def test_the_way_is_chosen_by_what_it_takes(folder, url, monkeypatch, seconds, chosen):
    """vLLM on two cores took 2.5 to 2.8 s for a rated prompt of 600 tokens, 0.3 to 0.8 s for a
    cached position."""

    def measured(asker, offer, prompt, width):
        return seconds[offer.blocks]

    monkeypatch.setattr(blocks, "_seconds", measured)
    lacking = ("prompt_logprobs", "echo") if seconds["prompt_logprobs"] == math.inf else ()
    with faulty(url, refuse=lacking) as proxy:
        assert offer_of(over_http(folder, proxy.url, top_logprobs=20)).blocks == chosen


def test_prices_rule_lists_of_prompts_out(folder, url):
    with faulty(url, refuse=("prompt_logprobs", "echo")) as proxy:
        remote = over_http(folder, proxy.url, top_logprobs=20, prompt_price=1.0)
        assert offer_of(remote).blocks is None


def test_no_request_asks_to_read_the_prefix_cache_along_with_rated_prompts(folder, url):
    """skip_reading_prefix_cache=false with prompt_logprobs ended vLLM's engine."""
    with faulty(url) as proxy:
        over_http(folder, proxy.url, top_logprobs=5).generate(PROMPTS[:2], max_new_tokens=4)
        assert not any("skip_reading_prefix_cache" in body for body in proxy.asked)
