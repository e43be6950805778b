"""What clients send by default: neutral values and bookkeeping are taken, the rest is refused.

On 538a493 nearly every body here was answered by HTTP 400 "unknown field ..."; those that pass
there are marked.
"""

import json
from functools import cache

import openai
import pytest
import requests

from proxytune.server import ServerSettings, create_app
from tests.api_triple import over_http, save_triple, served
from tests.serving import running
from tests.test_server import triple

PROMPT = "Natalia sold clips to"
TURN = {"role": "user", "content": "Hello"}
BODIES = {
    "completions": {"prompt": PROMPT, "max_tokens": 6, "temperature": 0},
    "chat/completions": {"messages": [TURN], "max_tokens": 6, "temperature": 0},
    "responses": {"input": "Hello", "max_output_tokens": 6, "temperature": 0},
}
ALL, CHATS, NEW = tuple(BODIES), ("chat/completions",), ("chat/completions", "responses")
COMPLETIONS = ("completions",)
OLD = ("completions", "chat/completions")


@cache
def alone():
    """The same triple without a server."""
    return triple()


@pytest.fixture(scope="module")
def url():
    settings = ServerSettings(max_logprobs=-1, max_tokens=64)
    with running(create_app({"tiny": triple()}, settings)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def text_of(endpoint: str, answer: dict) -> str:
    if endpoint == "responses":
        return answer["output"][0]["content"][0]["text"]
    (choice,) = answer["choices"]
    return choice["text"] if endpoint == "completions" else choice["message"]["content"]


def ask(url: str, endpoint: str, change: dict) -> requests.Response:
    return requests.post(f"{url}/{endpoint}", json=BODIES[endpoint] | change)


@pytest.fixture(scope="module")
def plain(url) -> dict[str, str]:
    """The text of each endpoint without any further field."""
    return {name: text_of(name, ask(url, name, {}).json()) for name in BODIES}


NEUTRAL = [
    # the issue's
    ({"response_format": {"type": "text"}}, ALL),
    ({"tools": []}, NEW),
    ({"tool_choice": "none"}, NEW),
    ({"functions": []}, CHATS),
    ({"min_p": 0}, ALL),
    ({"repetition_penalty": 1.0}, ALL),
    ({"repetition_penalty": 1}, ALL),
    ({"min_tokens": 0}, ALL),
    ({"ignore_eos": False}, ALL),
    ({"skip_special_tokens": True}, ALL),
    ({"stop_token_ids": []}, ALL),
    ({"chat_template_kwargs": {}}, NEW),
    ({"include_stop_str_in_output": False}, ALL),
    ({"modalities": ["text"]}, CHATS),
    ({"prediction": None, "audio": None, "web_search_options": None}, CHATS),
    ({"store": False, "metadata": {"run": "7"}, "user": "me", "service_tier": "auto"}, ALL),
    ({"store": True, "parallel_tool_calls": True, "prompt_cache_key": "k"}, ALL),
    ({"safety_identifier": "s", "reasoning_effort": "low", "verbosity": "medium"}, ALL),
    # ours
    ({"presence_penalty": 0.0, "frequency_penalty": 0}, ALL),  # passes on 538a493, too
    ({"logit_bias": {}, "stop": None, "n": 1, "top_p": 1, "top_k": -1}, OLD),  # passes, too
    ({"tool_choice": "auto", "tools": None}, NEW),
    ({"function_call": "none"}, CHATS),
    ({"suffix": ""}, COMPLETIONS),
    ({"suffix": None, "echo": False, "best_of": 1}, COMPLETIONS),
    ({"echo": False, "best_of": 1, "documents": [], "add_special_tokens": False}, CHATS),
    ({"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}, ALL),
    ({"spaces_between_special_tokens": True, "detokenize": True, "bad_words": []}, ALL),
    ({"guided_json": None, "guided_regex": None, "structured_outputs": None}, ALL),
    ({"truncate_prompt_tokens": None, "allowed_token_ids": None, "kv_transfer_params": None}, ALL),
    ({"prompt_cache_retention": "24h", "request_id": "r", "priority": 0, "cache_salt": "x"}, ALL),
    ({"add_generation_prompt": True, "continue_final_message": False}, CHATS),
    ({"repeat_penalty": 1.0, "typical_p": 1.0, "cache_prompt": True}, ALL),
    # the sampler of a llama.cpp client, LM Studio's and ollama's bookkeeping
    ({"mirostat": 0, "mirostat_tau": 5, "dry_multiplier": 0, "dry_base": 1.75, "tfs_z": 1}, ALL),
    ({"xtc_probability": 0.0, "xtc_threshold": 0.1, "dynatemp_range": 0, "ttl": 300}, ALL),
    ({"keep_alive": "5m", "timings_per_token": True, "return_progress": True}, ALL),
    ({"transforms": [], "grammar": "", "usage": {"include": True}, "provider": {}}, ALL),
    ({"separate_reasoning": True, "rid": "x", "vllm_xargs": {}, "structured_outputs": {}}, ALL),
    ({"ignore_eos": False, "min_tokens": 0.0, "n": 1.0}, OLD),
    ({"max_tokens": 6.0, "temperature": 0.0}, OLD),  # a language without integers
    ({"max_completion_tokens": 6, "max_tokens": 6}, OLD),  # guidellm sends both
    ({"temperature": 1, "top_p": 0}, ALL),  # the likeliest token alone
    ({"logprobs": False, "top_logprobs": 0}, CHATS),
    ({"return_token_ids": False, "return_tokens_as_token_ids": False}, OLD),
    ({"a_field_of_tomorrow": None}, ALL),
    ({"stream": False, "stream_options": None}, ALL),
    ({"previous_response_id": None, "conversation": None, "prompt": None}, ("responses",)),
    # inspect_ai sends background: true; the answer comes whole, so nobody has to wait for it
    ({"background": True, "include": ["reasoning.encrypted_content"]}, ("responses",)),
    ({"background": False, "truncation": "disabled", "reasoning": None}, ("responses",)),
    ({"truncation": "auto", "reasoning": {"effort": "low", "summary": "auto"}}, ("responses",)),
    ({"text": {"format": {"type": "text"}, "verbosity": "low"}, "include": []}, ("responses",)),
    ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0}, ("responses",)),
    ({"stream_options": {"include_obfuscation": False}, "max_tool_calls": 3}, ("responses",)),
]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("change", "endpoint"),
    [(change, endpoint) for change, endpoints in NEUTRAL for endpoint in endpoints],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_neutral_value_changes_nothing(url, plain, change, endpoint):
    response = ask(url, endpoint, change)
    assert response.status_code == 200, response.text
    assert text_of(endpoint, response.json()) == plain[endpoint]


REFUSED = [
    ({"response_format": {"type": "json_object"}}, OLD, 'send {"type": "text"}'),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, NEW, "send []"),
    ({"tool_choice": "required"}, NEW, 'send "none"'),
    ({"functions": [{"name": "f"}]}, CHATS, "send []"),
    ({"min_tokens": 3}, ALL, "send 0"),
    ({"skip_special_tokens": False}, ALL, "send true"),
    ({"stop_token_ids": [2]}, ALL, "send []"),
    ({"include_stop_str_in_output": True}, ALL, "send false"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, NEW, "format.kind=chat"),
    ({"mirostat": 2}, ALL, "send 0"),
    ({"xtc_probability": 0.5}, ALL, "send 0"),
    ({"nvext": {"ignore_eos": True}}, ALL, "send {}"),
    ({"transforms": ["middle-out"]}, ALL, "unknown field"),
    ({"max_tokens": 4.5}, OLD, "valid integer"),
    ({"max_tokens": 0}, CHATS, "at least 1"),
    ({"max_tokens": -2}, OLD, "greater than or equal"),
    ({"modalities": ["text", "audio"]}, CHATS, 'send ["text"]'),
    ({"prediction": {"type": "content", "content": "a"}}, CHATS, "unknown field"),
    ({"web_search_options": {}}, CHATS, "unknown field"),
    ({"suffix": "end"}, COMPLETIONS, 'send ""'),
    ({"guided_json": {"type": "object"}}, ALL, "unknown field"),
    ({"use_beam_search": True}, ALL, "send false"),
    ({"min_tokens": False}, ALL, "send 0"),  # a truth value is no number
    ({"bad_words": ["x"]}, ALL, "send []"),
    ({"temprature": 0.5}, ALL, "did you mean temperature?"),
    ({"repetition_penalty": 0}, ALL, "greater than or equal"),
    ({"repetition_penalty": -1.1}, ALL, "greater than or equal"),
    ({"repetition_penalty": "1.0"}, ALL, "valid number"),
    ({"presence_penalty": 2.5}, ALL, "less than or equal to 2"),
    ({"frequency_penalty": -2.5}, ALL, "greater than or equal to -2"),
    ({"min_p": 1.5}, ALL, "less than or equal to 1"),
    ({"min_p": -0.1}, ALL, "greater than or equal to 0"),
    ({"ignore_eos": "yes"}, ALL, "valid boolean"),
    ({"ignore_eos": 1}, ALL, "valid boolean"),
    ({"continue_final_message": True}, CHATS, "must be false"),
    ({"add_generation_prompt": False}, CHATS, "must be true"),
    ({"previous_response_id": "resp_1"}, ("responses",), "unknown field"),
    ({"context_management": [{"type": "compaction"}]}, ("responses",), "send []"),
    ({"text": {"format": {"type": "json_schema"}}}, ("responses",), "text.format"),
    ({"include": ["secrets"]}, ("responses",), "include"),
    ({"top_logprobs": 3}, ("responses",), "needs include"),
    ({"n": 2}, ("responses",), "unknown field 'n'"),
    ({"max_tokens": 5}, ("responses",), "unknown field 'max_tokens'"),
    ({"max_output_tokens": 1000}, ("responses",), "limit of 64"),
]


@pytest.mark.parametrize(
    ("change", "endpoint", "said"),
    [(change, endpoint, said) for change, endpoints, said in REFUSED for endpoint in endpoints],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_would_change_the_answer_is_refused_by_name(url, change, endpoint, said):
    response = ask(url, endpoint, change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert said in error["message"] and "\n" not in error["message"]
    (name,) = change
    # the server counts an answer's tokens under one name
    assert error["param"] == ("max_tokens" if name == "max_output_tokens" else name)


MESSAGES = [
    TURN | {"name": None, "refusal": None, "tool_calls": None, "audio": None},
    TURN | {"function_call": None, "annotations": [], "reasoning_content": None},
    TURN | {"tool_calls": [], "provider_specific_fields": None, "invalid_tool_calls": []},
    TURN | {"type": "text"},  # lm-eval's local-chat-completions
    TURN | {"type": "message", "id": "m1", "timestamp": 1.5, "reasoning_content": ""},
    {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": None}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Hel"},
            {"type": "text", "text": "lo", "cache_control": {"type": "ephemeral"}},
        ],
    },
]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda value: json.dumps(value)[:70])
def test_nulls_inside_of_messages_are_dropped(url, plain, message):
    response = ask(url, "chat/completions", {"messages": [message]})
    assert response.status_code == 200, response.text
    assert text_of("chat/completions", response.json()) == plain["chat/completions"]


def test_an_answer_can_be_sent_back_as_it_came(client):
    """`message.model_dump()` holds refusal, annotations, audio, function_call and tool_calls."""
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    first = client.chat.completions.create(messages=[TURN], **asked).choices[0].message
    more = {"role": "user", "content": "Go on"}
    answers = [
        client.chat.completions.create(messages=[TURN, each, more], **asked).choices[0].message
        for each in (first.model_dump(), {"role": "assistant", "content": first.content})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "message",
    [
        TURN | {"tool_calls": [{"id": "1", "type": "function"}]},
        TURN | {"audio": {"id": "a"}},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_a_message_that_is_more_than_text_is_refused(url, message):
    response = ask(url, "chat/completions", {"messages": [message, TURN]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_what_vllm_bench_serve_sends(url, plain):
    """Its request function for the backend `openai`, and `openai-chat`; it needs usage and chunks.

    Fails on 538a493: 20 of 20 requests, for the repetition penalty.
    """
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": 6,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
    }
    with requests.post(f"{url}/completions", json=body | {"ignore_eos": True}) as response:
        assert response.status_code == 200, response.text
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(each["choices"][0]["text"] for each in chunks if each["choices"])
    assert text == plain["completions"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_completion_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    response = requests.post(f"{url}/chat/completions", json=chat | {"ignore_eos": True})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    used = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines]
    assert used == sorted(used) and used[-1] == 6 and used[0] < 6


SETTINGS = [
    {"repetition_penalty": 3.0},
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"temperature": 1.5, "min_p": 0.3, "seed": 4},
    {"ignore_eos": True},
]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("endpoint", ALL)
def test_the_settings_are_the_generator_s(url, endpoint, settings):
    prompts = {"completions": PROMPT}.get(endpoint, [TURN])
    limit = "max_output_tokens" if endpoint == "responses" else "max_tokens"
    answer = ask(url, endpoint, {limit: 40} | settings).json()
    (expected,) = alone().generate([prompts], max_new_tokens=40, **settings)
    assert text_of(endpoint, answer) == expected.text


def test_a_length_that_is_fixed_by_a_minimum(url):
    """genai-perf sends `min_tokens` with `ignore_eos`; there the answer has its full length."""
    fixed = {"min_tokens": 6, "ignore_eos": True}
    assert ask(url, "completions", fixed).json()["usage"]["completion_tokens"] == 6
    assert ask(url, "completions", fixed | {"stop": "a"}).status_code == 400


def test_minus_one_is_the_rest_of_the_context(url):
    """LM Studio's and llama.cpp's clients send it; the server's own limit is 64 here."""
    for endpoint in OLD:
        whole = {"max_tokens": -1, "ignore_eos": True}
        assert ask(url, endpoint, whole).json()["usage"]["completion_tokens"] == 64
    whole = {"max_output_tokens": -1, "ignore_eos": True}
    assert ask(url, "responses", whole).json()["usage"]["output_tokens"] == 64


@pytest.mark.thinned(1)
@pytest.mark.parametrize("endpoint", OLD)
def test_token_ids_come_whole_and_in_pieces(url, endpoint):
    """vLLM's `return_token_ids`; the token that ends an answer is among them."""
    prompt = PROMPT if endpoint == "completions" else [TURN]
    for change in ({}, {"logit_bias": {"2": 100}}, {"n": 2, "temperature": 1.0, "seed": 1}):
        more = {"return_token_ids": True} | change
        answer = ask(url, endpoint, more).json()
        ids = [choice["token_ids"] for choice in answer["choices"]]
        holder = answer["choices"][0] if endpoint == "completions" else answer
        assert holder["prompt_token_ids"] == alone().encode(prompt)["base"]
        if "logit_bias" in change:
            assert ids == [[2]]  # </s> alone
        else:
            sampling = {key: change[key] for key in change}
            made = alone().generate([prompt], max_new_tokens=6, **sampling)
            assert ids == [[*e.token_ids, *[2] * (e.finish_reason == "eos")] for e in made]
        response = ask(url, endpoint, more | {"stream": True})
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        streamed = {index: [] for index in range(len(ids))}
        prompts = []
        for chunk in chunks:
            prompts += [chunk[key] for key in ("prompt_token_ids",) if key in chunk]
            for choice in chunk["choices"]:
                streamed[choice["index"]] += choice["token_ids"]
                prompts += [choice[key] for key in ("prompt_token_ids",) if key in choice]
        assert list(streamed.values()) == ids
        assert prompts == [alone().encode(prompt)["base"]] * len(ids)
    assert "token_ids" not in ask(url, endpoint, {}).text


def test_a_continued_turn_says_so(url):
    """vLLM's switches, as inspect_ai sends them where the last turn is the assistant's."""
    turns = [TURN, {"role": "assistant", "content": "Well,"}]
    right = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    answer = ask(url, "chat/completions", right)
    assert answer.status_code == 200
    without = ask(url, "chat/completions", {"messages": turns})
    assert answer.json()["choices"] == without.json()["choices"]
    wrong = ask(url, "chat/completions", {"messages": turns, "continue_final_message": False})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "continue_final_message"


@pytest.mark.slow
def test_a_base_behind_an_api_refuses_what_its_log_probabilities_cannot_tell(tmp_path):
    """A repetition penalty scales logits; log-probabilities lack the constant. Others are exact."""
    folder = save_triple(tmp_path)
    with served(folder, max_logprobs=-1) as upstream:
        remote = over_http(folder, upstream, top_logprobs=-1)
        with pytest.raises(ValueError, match="repetition_penalty scales logits"):
            remote.generate(["a"], repetition_penalty=1.1)
        with running(create_app({"tiny": remote})) as url:
            body = {"prompt": "a", "max_tokens": 5, "temperature": 0}
            response = requests.post(f"{url}/completions", json=body | {"repetition_penalty": 1.1})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "repetition_penalty"
            body |= {"repetition_penalty": 1.0}
            assert requests.post(f"{url}/completions", json=body).status_code == 200
