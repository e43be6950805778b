"""The worker's events as the JSON of POST /v1/responses, OpenAI's newer endpoint.

An answer is one message of one text. A stream names each step: the response is created, its
message and its text part are added, the text grows, and all three are closed.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.rows import Finished
from proxytune.engine.text import TokenTexts
from proxytune.server.answers import Answer, Json, RatedPrompts, Sample, Samples
from proxytune.server.errors import error_body
from proxytune.server.logprobs import LogprobWriter
from proxytune.server.prepare import Prepared
from proxytune.server.protocol import OUTPUT_LOGPROBS, ResponsesRequest
from proxytune.server.worker import Piece


class ResponsesAnswer(Answer):
    """The JSON of POST /v1/responses.

    Args:
        body: the request.
        prepared: its job.
        texts: the text of each token.
        model: the model's name in the answer.
    """

    last = b""

    def __init__(
        self, body: ResponsesRequest, prepared: Prepared, texts: TokenTexts, model: str
    ) -> None:
        self._rated = OUTPUT_LOGPROBS in (body.include or ())
        self._top = body.top_logprobs or 0
        self._writer = LogprobWriter(texts, as_ids=False)
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._head = _head(body, prepared, model)
        self._events = 0  # sent so far
        self._sample = Sample()  # as streamed so far

    def whole(self, samples: Samples, rated: RatedPrompts, used: Json) -> Json:
        """The answer as one JSON object."""
        return self._response(samples[0, 0], used)

    def begin(self) -> list[Json]:
        """The response is there, and nothing is in it yet."""
        return [
            self._event("response.created", response=self._head),
            self._event("response.in_progress", response=self._head),
        ]

    def opening(self, prompt: int, number: int, rated: RatedPrompts, used: Json) -> list[Json]:
        """Its message and the message's text begin."""
        message = self._message("in_progress", [])
        return [
            self._event("response.output_item.added", output_index=0, item=message),
            self._text_event("response.content_part.added", part=_part("", [])),
        ]

    def piece(self, piece: Piece, used: Json) -> list[Json]:
        """The text grows."""
        self._sample.add(piece)
        if not piece.text and piece.token is None:
            return []
        rated = self._logprobs([] if piece.token is None else [piece.token])
        return [self._text_event("response.output_text.delta", delta=piece.text, logprobs=rated)]

    def ended(self, prompt: int, finished: Finished, used: Json) -> list[Json]:
        """Its text and its message are whole."""
        self._sample.finished = finished
        part = self._part(self._sample)
        whole = {"text": part["text"], "logprobs": part["logprobs"]}
        message = self._message(_status(finished), [part])
        return [
            self._text_event("response.output_text.done", **whole),
            self._text_event("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=message),
        ]

    def end(self, used: Json) -> list[Json]:
        """The response is whole, too."""
        response = self._response(self._sample, used)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, status: int, message: str) -> Json:
        """OpenAI's error event; clients look for its parts at either of two places."""
        body = error_body(status, message)
        error = body["error"]
        flat = {"code": error["code"] or error["type"], "message": message, "param": None}
        return self._event("error", **flat, **body)

    def _response(self, sample: Sample, used: Json) -> Json:
        assert sample.finished is not None
        status = _status(sample.finished)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._head | {
            "status": status,
            "incomplete_details": cut,
            "output": [self._message(status, [self._part(sample)])],
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
        }

    def _message(self, status: str, content: list[Json]) -> Json:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, sample: Sample) -> Json:
        assert sample.finished is not None
        return _part(sample.finished.text, self._logprobs(sample.tokens))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> list[Json]:
        return self._writer.chat(tokens, self._top)["content"] if self._rated else []

    def _text_event(self, kind: str, **more: Any) -> Json:
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **more)

    def _event(self, kind: str, **more: Any) -> Json:
        event = {"type": kind, "sequence_number": self._events, **more}
        self._events += 1
        return event


def _head(body: ResponsesRequest, prepared: Prepared, model: str) -> Json:
    """The fields of a response that are known before its text; most have one value only here."""
    (request,) = prepared.job.requests
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": request.decoding.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.decoding.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
    }


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _status(finished: Finished) -> str:
    return "incomplete" if finished.finish_reason == "length" else "completed"
