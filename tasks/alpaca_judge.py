"""AlpacaEval's pairwise judge, through the alpaca-eval package.

The package decides everything that changes the number: the annotator configs (prompt, decoding,
parser) and the seeded order in which the two outputs are shown. Only the requests are ours, because
the package's client turns a failed request into an empty answer and drops the example.

The judge is an OpenAI model, a model behind an OpenAI-compatible URL, or a model on this machine.
"""

import difflib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import yaml

from proxytune.errors import MissingExtra, UserError
from proxytune.loopback import openai_client
from proxytune.members.api.faults import failure_of, reason_of
from proxytune.records import Example
from proxytune.secrets import redacted
from tasks.judge_requests import Accepted, accepted_by, complete, probe
from tasks.judgements import DEFAULT_CACHE, JudgeError, cached, encodable, remember, remembered
from tasks.local_chat import LocalChat

log = logging.getLogger(__name__)

_BLOCK = 16  # prompts per call of a decoder of the package; answers are stored after each call
# Settings of the package's own decoder, which our client handles itself or does not need.
_NOT_SENT = (
    "price_per_token",
    "num_procs",
    "batch_size",
    "client_kwargs",
    "n_retries",
    "requires_chatml",
    "is_chat",
    "is_strip",
    "sleep_time",
)

# Codes of a permanent refusal of one prompt, as is one that is too long: it gets no verdict, and
# scoring goes on.
_REFUSALS = ("content_filter", "content_policy_violation", "invalid_prompt")


@dataclass(frozen=True)
class AlpacaJudge:
    """Compares completions with the reference outputs.

    Attributes:
        annotator: an annotator config of alpaca-eval by name (alpaca_eval_gpt4_0314 is the
            paper's, weighted_alpaca_eval_gpt4_turbo is AlpacaEval 2's), or the folder of one.
        model: replaces the config's model. The results are then not those of the annotator's
            name; say so where they are shown.
        base_url: an OpenAI-compatible endpoint; None is OpenAI's own, or OPENAI_BASE_URL.
        api_key_env: the environment variable with the key, which only OpenAI needs.
        local: arguments of `tasks.local_chat.LocalChat`; the judge then runs on this machine.
        concurrency: requests that are open at once.
        max_retries: how often one request is repeated, with growing pauses, after rate limits
            (Retry-After is obeyed up to two minutes), server errors and lost connections.
        timeout: seconds for one request.
        max_unparsed: if a larger share of answers has no verdict, the judge counts as broken.
            Otherwise such examples leave the denominator, as in the package.
        seed: of the order in which the two outputs are shown; the package's own by default.
        cache: the file in which the judge's answers are stored; None stores none.
    """

    annotator: str = "alpaca_eval_gpt4_0314"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    local: dict[str, Any] | None = field(default=None, hash=False)
    concurrency: int = 5
    max_retries: int = 10
    timeout: float = 120.0
    max_unparsed: float = 0.05
    seed: int = 0
    cache: str | None = DEFAULT_CACHE

    def check(self) -> None:
        """Refuses a judge that cannot be asked, before hours of generation.

        Sends one cheap request, by which it is also found out how the model wants to be asked.

        Raises:
            UserError: an unknown annotator, a missing key, a local judge that cannot be loaded, a
                model or setting that the endpoint refuses.
        """
        self._check_settings()
        for config in self._configs().values():
            if self._asks_by_us(config["fn_completions"], config["completions_kwargs"]):
                self._probe(config)

    def _probe(self, config: dict[str, Any]) -> None:
        """Asks once; where nobody answers, takes what an earlier session found."""
        settings = self._request(config["completions_kwargs"])
        accepted = self._accepted(settings)
        about = {"accepted by": settings["model"], "base_url": redacted(self._url)}
        with self._client(config["completions_kwargs"], max_retries=1) as client:
            if probe(client, settings, accepted, **_small(config)):
                remember(self.cache, about, accepted.record())
            elif not accepted.record():
                accepted.restore(remembered(self.cache, about) or {})

    def _check_settings(self) -> None:
        for setting, low in (("concurrency", 1), ("max_retries", 0), ("timeout", 0.001)):
            if (value := getattr(self, setting)) < low:
                raise UserError(f"AlpacaEval's judge: {setting}={value} must be at least {low}")
        if self._url and not re.match(r"https?://[^/]", self._url):
            raise UserError(
                f"AlpacaEval's judge: base_url={self._url} is no address; it is like "
                "http://localhost:8000/v1"
            )
        if self._url and "?" in self._url:
            raise UserError(
                f"AlpacaEval's judge: base_url={redacted(self._url)} has a query; leave out what "
                "follows the question mark (Azure answers without at .../openai/v1)"
            )
        configs = self._configs()
        if self.local is not None:
            for config in configs.values():
                if "tools" in config["completions_kwargs"]:
                    raise UserError(
                        f"annotator={self.annotator} needs function calls, which a local judge "
                        "lacks; alpaca_eval_gpt4_0314 and weighted_alpaca_eval_gpt4_turbo do not"
                    )
            LocalChat(**self.local).check()
            return
        asks_openai = any(c["fn_completions"] == "openai_completions" for c in configs.values())
        if asks_openai and not self._url and not os.environ.get(self.api_key_env):
            raise UserError(
                f"AlpacaEval's judge {self.annotator} needs a key in the environment variable "
                f"{self.api_key_env}; set it, point the judge to your own endpoint (base_url=...) "
                "or to a local model (local.id=...), or only generate for now (stage=generate)"
            )

    def annotate(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float | None]:
        """Compares each text with its example's reference.

        Args:
            examples: `prompt.user` is the instruction, `target` the reference output.
            texts: one completion per example.

        Returns:
            [example]: 1 if the text wins, 0 if it loses, 0.5 for a draw; values in between from a
            weighted annotator; None if the judge's answer held no verdict.

        Raises:
            UserError: the key is missing, or the annotator is unknown.
            JudgeError: the judge failed, or too many answers hold no verdict; its answers so far
                are kept.
        """
        self._check_settings()
        if not examples:
            return []
        rows = [
            {"instruction": e.prompt.user, "output_1": str(e.target), "output_2": encodable(text)}
            for e, text in zip(examples, texts, strict=True)
        ]
        annotator = self._annotator()
        annotated = annotator(rows)
        assert len(annotated) == len(rows)
        verdicts = [_verdict(row["preference"]) for row in annotated]
        unparsed = verdicts.count(None)
        if unparsed:
            log.warning("%d of %d answers of the judge hold no verdict", unparsed, len(rows))
        if unparsed > self.max_unparsed * len(rows):
            raise JudgeError(
                f"{unparsed} of {len(rows)} answers of the judge {self.annotator} hold no verdict, "
                f"more than max_unparsed={self.max_unparsed}: this model cannot play that judge; "
                "choose another (model=..., annotator=...)"
            )
        return verdicts

    # -- the package's side --------------------

    @property
    def _url(self) -> str | None:
        """The endpoint, from `base_url` or OPENAI_BASE_URL; None is OpenAI's own."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def _configs(self) -> dict[str, dict[str, Any]]:
        package = find_spec("alpaca_eval")  # which takes seconds to import, and chatters
        if package is None:
            raise MissingExtra("alpaca_eval", "AlpacaEval's judge", "alpaca_eval")
        folder = Path(*package.submodule_search_locations or (), "evaluators_configs")
        path = Path(self.annotator) if Path(self.annotator).exists() else folder / self.annotator
        if not path.exists():
            known = sorted(p.parent.name for p in folder.glob("*/configs.yaml"))
            close = difflib.get_close_matches(self.annotator, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"alpaca-eval has no annotator {self.annotator!r}; {hint}")
        return yaml.safe_load((path / "configs.yaml" if path.is_dir() else path).read_text())

    def _annotator(self) -> Any:
        """The package's annotator, with our client in place of its own."""
        root = logging.getLogger()
        level = root.level
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # not by us
            from alpaca_eval.annotators import PairwiseAnnotator

        root.setLevel(level)  # importing the package lowers the level of every library's log
        path = Path(self.annotator)
        try:
            annotator = PairwiseAnnotator(
                annotators_config=path.resolve() if path.exists() else self.annotator,
                seed=self.seed,
                caching_path=None,
            )
        except ImportError as error:
            raise UserError(f"annotator={self.annotator} needs a package: {error}") from error
        for name, config in self._configs().items():
            single = annotator.annotators[name]
            decoder = config["fn_completions"]
            single.fn_completions = self._decoder(decoder, single.fn_completions)
        return annotator

    def _decoder(self, name: str, packages_own: Callable[..., Any]) -> Callable[..., Any]:
        """The function that alpaca-eval calls with prompts: cached, and it raises on failure."""

        def complete(prompts: Sequence[str], **settings: Any) -> dict[str, list[Any]]:
            if self.model is not None:
                settings = settings | {"model_name": self.model}
            identity = {"decoder": name, "settings": settings, "base_url": redacted(self._url)}
            if self.local is not None:
                chat = LocalChat(**self.local)
                identity = {"local": chat.identity(), "settings": settings}
                judge = chat.answers(settings)
            elif self._asks_by_us(name, settings):
                judge = self._ask_openai(settings)
            else:
                judge = self._ask_package(packages_own, settings)
            choices = cached(self.cache, identity, [p.strip() for p in prompts], judge)
            return {"completions": [c["text"] for c in choices], "completions_all": choices}

        return complete

    def _ask_package(
        self, decoder: Callable[..., Any], settings: dict[str, Any]
    ) -> Callable[[list[str]], Iterator[dict[str, Any]]]:
        """A decoder of alpaca-eval (Anthropic, Cohere, ...), called with blocks of prompts."""

        def judge(prompts: list[str]) -> Iterator[dict[str, Any]]:
            for start in range(0, len(prompts), _BLOCK):
                block = prompts[start : start + _BLOCK]
                try:
                    answers = decoder(prompts=block, **settings)
                except Exception as error:  # every service has its own exceptions
                    raise self._failed(error, start, len(prompts)) from error
                choices = answers.get("completions_all", answers["completions"])
                texts = answers["completions"]
                if "" in texts:  # the package reports a failed request as an empty answer
                    raise self._failed("it gave up on a request", start, len(prompts))
                yield {
                    prompt: (choice if isinstance(choice, dict) else {}) | {"text": text}
                    for prompt, choice, text in zip(block, choices, texts, strict=True)
                }

        return judge

    def identity(self) -> dict[str, Any]:
        """Everything that a verdict depends on besides the answers."""
        chat = None if self.local is None else LocalChat(**self.local).identity()
        names = {"annotator": self.annotator, "model": self.model, "base_url": redacted(self._url)}
        asked: dict[str, Any] = {}
        for config in self._configs().values():
            settings = config["completions_kwargs"]
            if self._asks_by_us(config["fn_completions"], settings):
                asked |= self._accepted(self._request(settings)).record()
        asked = {"asked": asked} if asked else {}
        return names | {"local": chat, "seed": self.seed} | asked

    # -- our side --------------------

    def _asks_by_us(self, decoder: str, settings: dict[str, Any]) -> bool:
        """Whether our client sends an annotator's requests."""
        biased = "tokens_to_favor" in settings or "tokens_to_avoid" in settings
        return self.local is None and decoder == "openai_completions" and not biased

    def _request(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The annotator's settings, named as in OpenAI's protocol."""
        request = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 2048}  # the package's defaults
        request |= {k: v for k, v in settings.items() if k not in _NOT_SENT}
        request["model"] = self.model or request["model_name"]
        del request["model_name"]
        return request

    def _accepted(self, request: dict[str, Any]) -> Accepted:
        return accepted_by(self._url, request["model"])

    def _client(self, settings: dict[str, Any], max_retries: int) -> openai.OpenAI:
        return openai_client(
            api_key=os.environ.get(self.api_key_env) or "none",  # the client wants one
            base_url=self.base_url or (settings.get("client_kwargs") or {}).get("base_url"),
            max_retries=max_retries,
            timeout=self.timeout,
        )

    def _ask_openai(
        self, settings: dict[str, Any]
    ) -> Callable[[list[str]], Iterator[dict[str, Any]]]:
        """Requests to an OpenAI-compatible endpoint, several at once."""
        request = self._request(settings)
        accepted = self._accepted(request)

        def judge(prompts: list[str]) -> Iterator[dict[str, Any]]:
            client = self._client(settings, self.max_retries)
            done = 0
            with client, ThreadPoolExecutor(self.concurrency) as pool:
                futures = {pool.submit(_choice, client, request, accepted, p): p for p in prompts}
                try:
                    for future in as_completed(futures):
                        choice = future.result()
                        yield {futures[future]: choice}
                        done += 1
                except (openai.OpenAIError, ValueError, KeyboardInterrupt) as error:
                    pool.shutdown(wait=True, cancel_futures=True)
                    for future, prompt in futures.items():  # answers that came back meanwhile
                        if future.done() and not future.cancelled() and not future.exception():
                            yield {prompt: future.result()}
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    raise self._failed(reason_of(error), done, len(prompts)) from error
                finally:  # if the caller stops early, send (and pay) nothing more
                    pool.shutdown(wait=True, cancel_futures=True)

        return judge

    def _failed(self, error: object, done: int, of: int) -> JudgeError:
        return JudgeError(
            f"the judge {self.model or self.annotator} failed after {done} of {of} answers: "
            f"{error}. They are kept; the same command with stage=score goes on from there"
        )


def _small(config: dict[str, Any]) -> dict[str, Any]:
    """A short prompt for the endpoint that an annotator's model is asked at."""
    model = str(config["completions_kwargs"]["model_name"])
    if "instruct" in model or model.startswith("text-"):  # as alpaca-eval tells them apart
        return {"prompt": "Say m."}
    return {"messages": [{"role": role, "content": "Say m."} for role in ("system", "user")]}


def _choice(
    client: openai.OpenAI, request: dict[str, Any], accepted: Accepted, prompt: str
) -> dict[str, Any]:
    """Asks the endpoint once; returns the answer in the form that alpaca-eval's parsers read.

    Raises:
        openai.OpenAIError: the request failed.
        JudgeError: the reply is not a completion.
    """
    reply: Any = None
    try:
        if prompt.startswith("<|im_start|>"):
            from alpaca_eval.utils import prompt_to_chatml

            messages = prompt_to_chatml(prompt)
            reply = complete(client, request, accepted, messages=messages)
            message = reply.choices[0].message
            text = message.content
            if message.tool_calls:
                text = message.tool_calls[0].function.arguments
            elif message.function_call:
                text = message.function_call.arguments
        else:
            reply = complete(client, request, accepted, prompt=prompt)
            text = reply.choices[0].text
    except openai.APIStatusError as error:
        failure = failure_of(error)
        assert failure is not None
        if not (failure.code in _REFUSALS or failure.room):
            raise
        log.warning("no verdict: the judge refuses a prompt (%s)", failure)
        return {"text": " ", "logprobs": None, "refusal": str(failure)}
    except (
        AttributeError,
        IndexError,
        TypeError,
    ) as error:  # an HTML page, say
        raise JudgeError(f"what it sends is no completion: {str(reply)[:200]!r}") from error
    return reply.choices[0].model_dump() | {"text": text or " "}


def _verdict(preference: Any) -> float | None:
    """Maps alpaca-eval's preference, 1 (the reference is better) to 2 (ours is), to 0 to 1."""
    if preference is None or preference != preference:  # NaN
        return None
    assert 1 <= preference <= 2
    return float(preference) - 1
