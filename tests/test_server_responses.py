"""POST /v1/responses, asked for by the `openai` client; the text is that of a chat completion.

On 538a493 there is no such endpoint (HTTP 404): every test here fails there.
"""

import json
from functools import cache

import openai
import pytest
import requests

from proxytune.server import ServerSettings, create_app
from tests.serving import running
from tests.test_server import triple


@cache
def alone():
    """The same triple without a server."""
    return triple()


@pytest.fixture(scope="module")
def url():
    with running(create_app({"tiny": triple()}, ServerSettings(max_logprobs=-1))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def respond(client, given, **settings):
    settings = {"max_output_tokens": 8, "temperature": 0} | settings
    return client.responses.create(model="tiny", input=given, **settings)


def chat(messages, **settings) -> str:
    (made,) = alone().generate([messages], **({"max_new_tokens": 8} | settings))
    return made.text


def turn(role, content):
    return {"role": role, "content": content}


INPUTS = {
    "text": ("Hello", [turn("user", "Hello")]),
    "message": ([turn("user", "Hello")], [turn("user", "Hello")]),
    "parts": (
        [
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Hel"},
                    {"type": "input_text", "text": "lo", "prompt_cache_breakpoint": None},
                ],
            }
        ],
        [turn("user", "Hello")],
    ),
    "developer": (
        [turn("developer", "Be kind."), turn("user", "Hello")],
        [turn("system", "Be kind."), turn("user", "Hello")],
    ),
    "history": (
        [
            turn("user", "Hello"),
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}
                ],
            },
            turn("user", "Go on"),
        ],
        [turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "Go on")],
    ),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", INPUTS)
def test_the_answer_is_that_of_the_conversation(client, name):
    given, messages = INPUTS[name]
    response = respond(client, given)
    assert response.output_text == chat(messages)
    assert response.object == "response" and response.model == "tiny" and response.error is None
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    usage = response.usage
    assert usage.input_tokens == len(alone().encode(messages)["base"])
    assert usage.output_tokens == 8 and usage.total_tokens == usage.input_tokens + 8
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_instructions_come_first(client):
    told = respond(client, "Hello", instructions="Be kind.")
    assert told.output_text == chat([turn("system", "Be kind."), turn("user", "Hello")])
    assert told.instructions == "Be kind."


def test_an_answer_that_ends_by_itself_is_completed(client):
    response = respond(client, "Hello", extra_body={"logit_bias": {"2": 100}})
    assert response.status == "completed" and response.incomplete_details is None
    assert response.output_text == "" and response.usage.output_tokens == 1


def test_sampling_settings_are_the_generator_s(client):
    settings = {"temperature": 1.1, "top_p": 0.9}
    more = {"seed": 5, "min_p": 0.02, "frequency_penalty": 1.0, "alpha": 0.7}
    response = respond(client, "Hello", extra_body=more, **settings)
    del more["alpha"]
    assert response.output_text == chat([turn("user", "Hello")], **settings, **more)
    assert response.temperature == 1.1 and response.top_p == 0.9
    free = {respond(client, "Hello", temperature=1.0).output_text for _ in range(3)}
    assert len(free) > 1


def test_everything_that_clients_send_by_default(client):
    """The client's own optional fields, and those of inspect_ai's provider `openai/`."""
    sent = respond(
        client,
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        top_p=1.0,
        store=False,
        metadata={"task": "gsm8k"},
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        truncation="disabled",
        reasoning=None,
        include=["reasoning.encrypted_content"],
        parallel_tool_calls=True,
        service_tier="auto",
        prompt_cache_key="key",
        safety_identifier="user-1",
        previous_response_id=None,
        background=False,
        user="me",
    )
    assert sent.output_text == chat([turn("user", "Hello")])
    assert sent.store is None or sent.store is False


def test_an_answer_can_be_sent_back(client):
    """The client's way to go on without the server's memory: input += response.output."""
    first = respond(client, "Hello")
    history = [turn("user", "Hello"), *first.output, turn("user", "Go on")]
    said = [turn("user", "Hello"), turn("assistant", first.output_text), turn("user", "Go on")]
    assert respond(client, history).output_text == chat(said)


def test_log_probabilities(client):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = respond(client, "Hello", **wanted)
    rated = response.output[0].content[0].logprobs
    answer = client.chat.completions.create(
        model="tiny",
        messages=[turn("user", "Hello")],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    expected = answer.choices[0].logprobs.content
    assert [each.token for each in rated] == [each.token for each in expected]
    for one, other in zip(rated, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [t.token for t in one.top_logprobs] == [t.token for t in other.top_logprobs]
    streamed = []
    for event in respond(client, "Hello", stream=True, **wanted):
        if event.type == "response.output_text.delta":
            streamed += [each.token for each in event.logprobs]
    assert streamed == [each.token for each in rated]


@pytest.mark.parametrize("bias", [{}, {"2": 100}], ids=["length", "eos"])
def test_a_stream_names_every_step(client, bias):
    body = {"logit_bias": bias}
    events = list(respond(client, "Hello", stream=True, extra_body=body))
    kinds = [event.type for event in events]
    ended = "response.completed" if bias else "response.incomplete"
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        ended,
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = respond(client, "Hello", extra_body=body)
    pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text == events[-1].response.output_text
    assert len(pieces) > 1 or bias
    assert events[-1].response.usage == whole.usage
    assert events[-1].response.id == events[0].response.id
    (message,) = events[-1].response.output
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {message.id}


def test_the_client_s_stream_manager_reads_it(client):
    long = chat([turn("user", "Hello")], max_new_tokens=30)
    settings = {"max_output_tokens": 30, "temperature": 0, "extra_body": {"stop": long[9:11]}}
    with client.responses.stream(model="tiny", input="Hello", **settings) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text == long[: long.index(long[9:11])]


def test_events_are_named_and_there_is_no_done(url):
    body = {"input": "Hello", "max_output_tokens": 3, "stream": True}
    lines = requests.post(f"{url}/responses", json=body).text.split("\n\n")
    assert lines.pop() == ""
    for line in lines:
        name, data = line.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_stream_that_fails_raises_at_the_client():
    """An error after the stream has begun: the client must not take the part for the whole."""
    with running(create_app({"tiny": triple()}, ServerSettings(timeout=1e-3))) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(respond(client, "Hello", max_output_tokens=400, stream=True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "messages"),
        ([{"type": "function_call_output", "call_id": "1", "output": "5"}], "messages"),
        ([turn("tool", "5")], "messages"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "text"),
        ([turn("user", "a " * 700)], "at most 512"),
        (5, "string"),
        (None, "string"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_input_that_is_not_text_is_refused(url, given, said):
    response = requests.post(f"{url}/responses", json={"input": given})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "input" and said in error["message"]


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.responses.create(model="gpt-5", input="Hello")
