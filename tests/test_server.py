"""The server's answers, asked for by the `openai` client, against the generator in one process."""

import json

import openai
import pytest
import requests

from proxytune import api
from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = "Natalia sold clips to"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


def triple(alpha: float = 0.7) -> api.Generator:
    models = [
        tiny_model(seed=0),
        tiny_model(seed=1, hidden=16),
        tiny_model(seed=2, hidden=16),
    ]
    return api.load(*models, alpha=alpha, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def alone() -> api.Generator:
    """The same triple without a server."""
    return triple()


@pytest.fixture(scope="module")
def url():
    with running(create_app({"tiny": triple()}, ServerSettings(max_logprobs=-1))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def complete(client, prompt=PROMPT, **settings):
    settings = {"max_tokens": 12, "temperature": 0} | settings
    extra = {k: settings.pop(k) for k in list(settings) if k in EXTRA}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **settings)


EXTRA = {
    "alpha",
    "top_k",
    "prompt_logprobs",
    "return_tokens_as_token_ids",
    "add_special_tokens",
}


def log_probs(generator, ids):
    return generator.logits(ids).log_softmax(-1)


# -- text --------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.9, "seed": 3, "n": 3},
        {"temperature": 1.0, "seed": 4, "n": 2, "top_p": 0.8},
        {"temperature": 1.2, "seed": -5, "top_k": 20},
        {"temperature": 1.0, "seed": 6, "n": 4, "stop": ["e", "ab"]},
    ],
)
def test_a_completion_is_what_the_generator_writes(client, alone, settings):
    prompts = [PROMPT, "def add(a, b):", PROMPT]
    answer = complete(client, prompts, **settings)
    expected = alone.generate(prompts, max_new_tokens=12, **settings)
    assert [choice.text for choice in answer.choices] == [each.text for each in expected]
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    reasons = {"eos": "stop", "stop": "stop", "length": "length"}
    found = [choice.finish_reason for choice in answer.choices]
    assert found == [reasons[each.finish_reason] for each in expected]
    assert answer.usage.prompt_tokens == sum(len(alone.encode(p)["base"]) for p in prompts)
    ended = sum(each.finish_reason == "eos" for each in expected)
    assert answer.usage.completion_tokens == ended + sum(len(e.token_ids) for e in expected)


def test_prompts_may_be_token_ids(client, alone):
    ids = alone.encode(PROMPT)["base"]
    texts = {complete(client, prompt).choices[0].text for prompt in (ids, [ids], PROMPT)}
    assert len(texts) == 1


def test_each_request_may_have_its_own_alpha(client):
    """Side by side with others: rows of one batch differ in alpha."""
    prompts = [PROMPT, "Question: What"]
    alone = triple()
    for alpha in (0.0, 0.5, -1.0, 2.0):
        alone.system.alphas = {"alpha": alpha}
        expected = alone.generate(prompts, max_new_tokens=12, temperature=1.0, seed=1)
        answer = complete(client, prompts, temperature=1.0, seed=1, alpha=alpha)
        assert [c.text for c in answer.choices] == [each.text for each in expected]


@pytest.mark.slow
def test_rows_of_different_alpha_share_a_batch(client):
    from concurrent.futures import ThreadPoolExecutor

    alphas = [None, 0.0, 0.5, 2.0] * 3
    with ThreadPoolExecutor(len(alphas)) as pool:
        asked = [
            pool.submit(complete, client, max_tokens=25, **({} if a is None else {"alpha": a}))
            for a in alphas
        ]
        texts = [each.result().choices[0].text for each in asked]
    alone, expected = triple(), {}
    for alpha in alphas[:4]:
        alone.system.alphas = {"alpha": 0.7 if alpha is None else alpha}
        (one,) = alone.generate([PROMPT], max_new_tokens=25)
        expected[alpha] = one.text
    assert texts == [expected[alpha] for alpha in alphas]
    assert len(set(texts)) > 2


def test_without_a_seed_answers_differ_and_with_one_they_do_not(client):
    free = {complete(client, temperature=1.0).choices[0].text for _ in range(3)}
    fixed = {complete(client, temperature=1.0, seed=9).choices[0].text for _ in range(3)}
    assert len(free) > 1 and len(fixed) == 1


def test_logit_bias_bans_and_forces_tokens(client, alone):
    (greedy,) = alone.generate([PROMPT], max_new_tokens=1)
    (first,) = greedy.token_ids
    banned = complete(client, max_tokens=1, logprobs=0, logit_bias={str(first): -100})
    forced = complete(client, max_tokens=3, logprobs=0, logit_bias={"77": 100})
    text = tiny_tokenizer().decode([77])
    assert banned.choices[0].logprobs.tokens != [tiny_tokenizer().decode([first])]
    assert forced.choices[0].logprobs.tokens == [text] * 3
    # the log-probabilities are the model's own, not those of the biased choice
    assert forced.choices[0].logprobs.token_logprobs[0] < -1


def test_a_conversation_is_rendered_for_each_member(client, alone):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0, n=2
    )
    (expected,) = alone.generate([MESSAGES], max_new_tokens=12)
    assert [choice.message.content for choice in answer.choices] == [expected.text] * 2
    assert answer.choices[0].message.role == "assistant"
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        }
    ]
    (expected,) = alone.generate([[{"role": "user", "content": "Hello"}]], max_new_tokens=5)
    answer = client.chat.completions.create(
        model="tiny", messages=parts, max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.content == expected.text


@pytest.mark.slow
def test_speculative_blocks_and_a_queue_change_nothing(alone):
    """Blocks of four for two rows at a time; seven samples with log-probabilities wait in line."""
    settings = {"temperature": 1.0, "seed": 2, "n": 3}
    prompts = [PROMPT, "Question: What"]
    app = create_app({"tiny": triple()}, speculative=3, batch_size=2)
    with running(app) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = complete(client, prompts, logprobs=0, return_tokens_as_token_ids=True, **settings)
        banned = complete(client, alpha=0.0, max_tokens=30, logit_bias={"2": -100})
    expected = alone.generate(prompts, max_new_tokens=12, **settings)
    assert [choice.text for choice in answer.choices] == [each.text for each in expected]
    for choice, generation in zip(answer.choices, expected, strict=True):
        prompt = alone.encode(prompts[generation.prompt_index])["base"]
        ids = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        rated = log_probs(alone, [*prompt, *ids])[len(prompt) - 1 : -1]
        values = [rated[index, token].item() for index, token in enumerate(ids)]
        assert choice.logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    (unbanned,) = triple(0.0).generate([PROMPT], max_new_tokens=30)
    assert banned.usage.completion_tokens == 30
    assert banned.choices[0].text.startswith(unbanned.text)


def test_several_models_behind_one_address(alone):
    single = api.load(tiny_model(seed=0), tokenizer=tiny_tokenizer())
    with running(create_app({"triple": triple(), "single": single})) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["triple", "single"]
        for name, generator in (("triple", alone), ("single", triple(0.0))):
            answer = client.completions.create(
                model=name, prompt=PROMPT, max_tokens=9, temperature=0
            )
            (expected,) = generator.generate([PROMPT], max_new_tokens=9)
            assert answer.choices[0].text == expected.text
            assert answer.model == name


# -- streams --------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize("stop", [None, ["e", "ab", "sold"]])
def test_a_stream_s_pieces_make_up_the_answer(client, stop):
    settings = {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 30, "stop": stop}
    whole = complete(client, [PROMPT, "def"], **settings)
    texts, reasons = {}, {}
    usage = None
    for chunk in complete(
        client, [PROMPT, "def"], stream=True, stream_options={"include_usage": True}, **settings
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert [texts[i] for i in range(6)] == [choice.text for choice in whole.choices]
    assert [reasons[i] for i in range(6)] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_streamed_conversation_says_who_speaks_and_then_the_text(client):
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(**settings, logprobs=True, top_logprobs=2, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    streamed = [t for c in chunks if (rated := c.choices[0].logprobs) for t in rated.content]
    for found, expected in zip(streamed, whole.choices[0].logprobs.content, strict=True):
        assert found.bytes == expected.bytes
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [t.token for t in found.top_logprobs] == [t.token for t in expected.top_logprobs]
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stream_echoes_the_prompt_first(client):
    settings = {"echo": True, "logprobs": 1, "n": 2, "seed": 1, "temperature": 1.0}
    whole = complete(client, **settings)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]
    for chunk in complete(client, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.token_logprobs
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    for found, choice in zip(tokens, whole.choices, strict=True):
        assert found == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


# -- log-probabilities --------------------


def test_logprobs_are_the_generator_s(client, alone):
    (choice,) = complete(client, logprobs=3, return_tokens_as_token_ids=True).choices
    prompt = alone.encode(PROMPT)["base"]
    ids = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    (expected,) = alone.generate([PROMPT], max_new_tokens=12)
    assert ids[: len(expected.token_ids)] == expected.token_ids
    rated = log_probs(alone, [*prompt, *ids])[len(prompt) - 1 : -1]
    for index, token in enumerate(ids):
        assert choice.logprobs.token_logprobs[index] == pytest.approx(
            rated[index, token].item(), abs=1e-4
        )
        values, best = rated[index].topk(3)
        top = choice.logprobs.top_logprobs[index]
        assert set(top) == {f"token_id:{i}" for i in best.tolist()} | {f"token_id:{token}"}
        assert max(top.values()) == pytest.approx(values[0].item(), abs=1e-4)


def test_the_token_that_ends_a_completion_has_its_logprob_too(client, alone):
    (choice,) = complete(client, logprobs=0, logit_bias={"2": 100}).choices
    assert choice.text == "" and choice.finish_reason == "stop"
    assert choice.logprobs.tokens == ["</s>"]


def test_echo_gives_the_prompt_s_log_probabilities(client, alone):
    (choice,) = complete(client, echo=True, logprobs=1, max_tokens=0).choices
    ids = alone.encode(PROMPT)["base"]
    rated = log_probs(alone, ids)
    assert choice.text == PROMPT
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    for index, token in enumerate(ids[1:]):
        assert choice.logprobs.token_logprobs[index + 1] == pytest.approx(
            rated[index, token].item(), abs=1e-4
        )
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert PROMPT[offset:].startswith(token) or token == "<s>"


def test_echo_and_a_completion_in_one(client):
    (both,) = complete(client, echo=True, logprobs=2, max_tokens=4).choices
    (prompt,) = complete(client, echo=True, logprobs=2, max_tokens=0).choices
    (rest,) = complete(client, logprobs=2, max_tokens=4).choices
    assert both.text == prompt.text + rest.text
    assert both.logprobs.tokens == prompt.logprobs.tokens + rest.logprobs.tokens
    found = both.logprobs.token_logprobs[1:]
    expected = prompt.logprobs.token_logprobs[1:] + rest.logprobs.token_logprobs
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5])
def test_prompt_logprobs_of_several_prompts(client, alpha):
    prompts = [PROMPT, "def add(a, b):\n    return", "Q"]
    own = {} if alpha is None else {"alpha": alpha}
    answer = complete(client, prompts, prompt_logprobs=2, max_tokens=1, **own)
    generator = triple(0.7 if alpha is None else alpha)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = generator.encode(prompt)["base"]
        rated = log_probs(generator, ids)
        assert choice.prompt_logprobs[0] is None
        assert len(choice.prompt_logprobs) == len(ids)
        for index, token in enumerate(ids[1:]):
            entry = choice.prompt_logprobs[index + 1]
            own_entry = entry[str(token)]
            assert own_entry["logprob"] == pytest.approx(rated[index, token].item(), abs=1e-4)
            assert own_entry["rank"] == (rated[index] > rated[index, token]).sum().item() + 1
            assert {str(i) for i in rated[index].topk(2).indices.tolist()} <= entry.keys()


def test_the_whole_vocabulary_can_be_had(client, alone):
    (choice,) = complete(client, logprobs=-1, max_tokens=2, return_tokens_as_token_ids=True).choices
    assert [len(top) for top in choice.logprobs.top_logprobs] == [alone.vocab_size] * 2
    rated = log_probs(alone, alone.encode(PROMPT)["base"])[-1]
    for name, value in choice.logprobs.top_logprobs[0].items():
        token = int(name.removeprefix("token_id:"))
        assert value == pytest.approx(rated[token].item(), abs=1e-3)


def test_chat_logprobs_carry_the_bytes_of_each_token(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=1.0,
        seed=1,
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = answer.choices
    content = [t for t in choice.logprobs.content if t.token != "</s>"]
    written = b"".join(bytes(token.bytes) for token in content)
    assert written.decode(errors="replace") == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_special_tokens_can_be_left_out(client, alone):
    (choice,) = complete(client, prompt_logprobs=0, max_tokens=0, add_special_tokens=False).choices
    ids = tiny_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"]
    assert [next(iter(each)) for each in choice.prompt_logprobs[1:]] == [str(i) for i in ids[1:]]


# -- the rest --------------------


def test_models_health_and_metrics(client, url):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    root = url.removesuffix("/v1")
    assert requests.get(f"{root}/health").json() == {"status": "ok"}

    def metrics() -> dict[str, float]:
        lines = requests.get(f"{root}/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    before = metrics()
    usage = complete(client, n=2, temperature=1.0).usage
    after = metrics()
    done = 'proxytune_requests_total{path="/v1/completions",status="200"}'
    assert after[done] == before[done] + 1
    generated = 'proxytune_generated_tokens_total{model="tiny"}'
    assert after[generated] == before[generated] + usage.completion_tokens
    assert after['proxytune_running_rows{model="tiny"}'] == 0
    assert after['proxytune_waiting{model="tiny"}'] == 0
    assert after['proxytune_request_seconds_count{path="/v1/completions"}'] > 1


def test_plain_http_without_a_client_library(url):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    with requests.post(f"{url}/completions", json=body, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == b"data: [DONE]"
    assert all(json.loads(line.removeprefix(b"data: "))["choices"] for line in lines[:-1])
