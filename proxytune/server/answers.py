"""The worker's events as OpenAI's and vLLM's JSON."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.rows import Finished
from proxytune.engine.sampling import NOTHING
from proxytune.engine.text import TokenTexts
from proxytune.server.errors import error_body
from proxytune.server.logprobs import LogprobWriter
from proxytune.server.prepare import Prepared
from proxytune.server.protocol import ChatRequest, CompletionRequest
from proxytune.server.worker import Piece

# "nothing": a base behind an API listed no token that may be chosen
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "nothing": "stop"}

RatedPrompts = Mapping[int, Sequence[TokenLogprob | None]]  # by the prompt's place


def generated_tokens(finished: Finished) -> int:
    """How many tokens of a sample `usage` counts: the one that ended it included."""
    return len(finished.token_ids) + (finished.finish_reason == "eos")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class Sample:
    """A sample's events so far; `finished` stays None if the request asks for no completion."""

    tokens: list[TokenLogprob] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # those with the members' log-probabilities
    finished: Finished | None = None

    def add(self, piece: Piece) -> None:
        """Notes one more token."""
        self.ids += _ids(piece)
        if piece.token is not None:
            self.tokens.append(piece.token)
        if piece.members is not None:
            self.pieces.append(piece)


Samples = Mapping[tuple[int, int], Sample]  # by the prompt's place and the sample's number
Json = dict[str, Any]


class Answer(ABC):
    """The JSON of one answer, whole or as the events of a stream.

    Every method that takes `used` gets the tokens counted so far, as `usage` writes them.
    """

    last: bytes = b"data: [DONE]\n\n"  # ends a stream

    @abstractmethod
    def whole(self, samples: Samples, rated: RatedPrompts, used: Json) -> Json:
        """The answer as one JSON object."""

    def begin(self) -> list[Json]:
        """The events of a stream before anything is known."""
        return []

    @abstractmethod
    def opening(self, prompt: int, number: int, rated: RatedPrompts, used: Json) -> list[Json]:
        """The events before a sample's first token."""

    @abstractmethod
    def piece(self, piece: Piece, used: Json) -> list[Json]:
        """The events of one more token."""

    @abstractmethod
    def ended(self, prompt: int, finished: Finished, used: Json) -> list[Json]:
        """The events of a sample's end."""

    @abstractmethod
    def end(self, used: Json) -> list[Json]:
        """The events after the last sample."""

    def failed(self, status: int, message: str) -> Json:
        """The event that ends a stream which cannot go on."""
        return error_body(status, message)


class _Chunks(Answer):
    """A stream of chunks that each hold one choice: completions and chat completions."""

    def __init__(
        self,
        body: CompletionRequest | ChatRequest,
        prepared: Prepared,
        head: Json,
        texts: TokenTexts,
    ) -> None:
        self._prepared = prepared
        self._writer = LogprobWriter(texts, bool(body.return_tokens_as_token_ids))
        self._ids = bool(body.return_token_ids)
        self._chunk_head = head
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._every_usage = bool(self._usage and options and options.continuous_usage_stats)

    @abstractmethod
    def _delta(
        self,
        index: tuple[int, int],
        text: str,
        tokens: Sequence[TokenLogprob],
        ids: Sequence[int],
        reason: str | None,
    ) -> Json:
        """The choice of one chunk.

        Args:
            index: the prompt's place and the sample's number.
            text: what the chunk adds.
            tokens: the log-probabilities of the tokens that it adds, if they were asked for.
            ids: these tokens.
            reason: why the sample has ended, in the last chunk.
        """

    def _chunk(self, choices: list[Json], used: Json | None) -> Json:
        if not self._usage:
            return self._chunk_head | {"choices": choices}
        shown = used if self._every_usage or not choices else None
        return self._chunk_head | {"choices": choices, "usage": shown}

    def piece(self, piece: Piece, used: Json) -> list[Json]:
        """A chunk, unless the token adds nothing that was asked for."""
        members = self._writer.members([piece])
        rated = piece.token is not None or bool(members)
        if not piece.text and not rated and not (self._ids and _ids(piece)):
            return []
        tokens = [] if piece.token is None else [piece.token]
        at = piece.prompt, piece.sample
        choice = self._delta(at, piece.text, tokens, _ids(piece), None)
        return [self._chunk([choice | members], used)]

    def ended(self, prompt: int, finished: Finished, used: Json) -> list[Json]:
        """The chunk with the reason."""
        at = prompt, finished.sample
        return [self._chunk([self._delta(at, "", [], [], finished.finish_reason)], used)]

    def end(self, used: Json) -> list[Json]:
        """The chunk with the usage, if it was asked for."""
        return [self._chunk([], used)] if self._usage else []

    def _with_ids(self, choice: Json, ids: Sequence[int]) -> Json:
        return choice | {"token_ids": list(ids)} if self._ids else choice


class CompletionAnswer(_Chunks):
    """The JSON of POST /v1/completions.

    Args:
        body: the request.
        prepared: its job.
        texts: the text of each token.
        model: the model's name in the answer.
    """

    def __init__(
        self, body: CompletionRequest, prepared: Prepared, texts: TokenTexts, model: str
    ) -> None:
        self._head = _head("cmpl", "text_completion", model)
        super().__init__(body, prepared, self._head, texts)
        self._body = body
        self._offsets: dict[int, int] = {}  # choice -> where its next token's text begins

    def whole(self, samples: Samples, rated: RatedPrompts, used: Json) -> Json:
        """The answer as one JSON object."""
        choices = []
        for prompt, number in self._prepared.samples():
            sample = samples.get((prompt, number), Sample())
            text, reason = self._echo(prompt), "length"
            if sample.finished is not None:
                text, reason = text + sample.finished.text, sample.finished.finish_reason
            ids, before = self._before(prompt, rated)
            ids, tokens = [*ids, *(each.id for each in sample.tokens)], [*before, *sample.tokens]
            choice = self._choice((prompt, number), text, ids, tokens, reason)
            if self._body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self._writer.prompt(
                    rated[prompt], self._body.prompt_logprobs
                )
            choice |= self._writer.members(sample.pieces)
            choices.append(self._with_prompt(self._with_ids(choice, sample.ids), prompt))
        return self._head | {"choices": choices, "usage": used}

    def opening(self, prompt: int, number: int, rated: RatedPrompts, used: Json) -> list[Json]:
        """The echoed prompt and its token ids, if they were asked for."""
        if not self._body.echo and not self._ids:
            return []
        ids, tokens = self._before(prompt, rated)
        choice = self._choice((prompt, number), self._echo(prompt), ids, tokens, None)
        return [self._chunk([self._with_prompt(self._with_ids(choice, []), prompt)], used)]

    def _delta(
        self,
        index: tuple[int, int],
        text: str,
        tokens: Sequence[TokenLogprob],
        ids: Sequence[int],
        reason: str | None,
    ) -> Json:
        choice = self._choice(index, text, [each.id for each in tokens], tokens, reason)
        return self._with_ids(choice, ids)

    def _choice(
        self,
        index: tuple[int, int],
        text: str,
        ids: Sequence[int],
        tokens: Sequence[TokenLogprob | None],
        reason: str | None,
    ) -> Json:
        place = index[0] * self._prepared.n + index[1]
        logprobs = None
        if self._body.logprobs is not None and tokens:
            offset = self._offsets.get(place, 0)
            logprobs = self._writer.completion(ids, tokens, self._body.logprobs, offset)
            self._offsets[place] = offset + self._writer.length(ids)
        return {
            "index": place,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None if reason is None else FINISH_REASONS[reason],
        }

    def _with_prompt(self, choice: Json, prompt: int) -> Json:
        return choice | {"prompt_token_ids": self._prepared.ids[prompt]} if self._ids else choice

    def _before(
        self, prompt: int, rated: RatedPrompts
    ) -> tuple[Sequence[int], Sequence[TokenLogprob | None]]:
        """The prompt's tokens and their log-probabilities; empty unless echo and logprobs ask."""
        if not self._body.echo or self._body.logprobs is None:
            return [], []
        return self._prepared.ids[prompt], rated[prompt]

    def _echo(self, prompt: int) -> str:
        return self._prepared.echo[prompt] if self._prepared.echo else ""


class ChatAnswer(_Chunks):
    """The JSON of POST /v1/chat/completions; arguments and methods are `CompletionAnswer`'s."""

    def __init__(
        self, body: ChatRequest, prepared: Prepared, texts: TokenTexts, model: str
    ) -> None:
        self._head = _head("chatcmpl", "chat.completion", model)
        super().__init__(body, prepared, self._head | {"object": "chat.completion.chunk"}, texts)
        self._body = body

    def whole(self, samples: Samples, rated: RatedPrompts, used: Json) -> Json:
        """The answer as one JSON object."""
        choices = []
        for number in range(self._prepared.n):
            sample = samples[0, number]
            assert sample.finished is not None
            message = {"role": "assistant", "content": sample.finished.text}
            reason = sample.finished.finish_reason
            choice = self._choice(number, "message", message, sample.tokens, reason)
            choice |= self._writer.members(sample.pieces)
            choices.append(self._with_ids(choice, sample.ids))
        return self._with_prompt(self._head | {"choices": choices, "usage": used})

    def opening(self, prompt: int, number: int, rated: RatedPrompts, used: Json) -> list[Json]:
        """The first chunk of a sample, which names the assistant as the speaker."""
        message = {"role": "assistant", "content": ""}
        choice = self._with_ids(self._choice(number, "delta", message, [], None), [])
        return [self._with_prompt(self._chunk([choice], used))]

    def _delta(
        self,
        index: tuple[int, int],
        text: str,
        tokens: Sequence[TokenLogprob],
        ids: Sequence[int],
        reason: str | None,
    ) -> Json:
        delta = {"content": text} if text or reason is None else {}
        return self._with_ids(self._choice(index[1], "delta", delta, tokens, reason), ids)

    def _with_prompt(self, answer: Json) -> Json:
        return answer | {"prompt_token_ids": self._prepared.ids[0]} if self._ids else answer

    def _choice(
        self,
        number: int,
        kind: str,
        message: dict[str, str],
        tokens: Sequence[TokenLogprob],
        reason: str | None,
    ) -> Json:
        logprobs = None
        if self._body.logprobs and (tokens or kind == "message"):
            logprobs = self._writer.chat(tokens, self._body.top_logprobs or 0)
        return {
            "index": number,
            kind: message,
            "logprobs": logprobs,
            "finish_reason": None if reason is None else FINISH_REASONS[reason],
        }


def _ids(piece: Piece) -> list[int]:
    return [] if piece.id == NOTHING else [piece.id]


def _head(kind: str, name: str, model: str) -> Json:
    made = {"id": f"{kind}-{uuid.uuid4().hex}", "object": name, "created": int(time.time())}
    return made | {"model": model}
