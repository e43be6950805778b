"""A `Generator` on a vLLM engine: the same calls, the same prompts, the same draws."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from proxytune.engine.combining import Combination
from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.system import Prompt
from proxytune.errors import UserError
from proxytune.generator import Generator, Pairs, Speculative
from proxytune.loading.formulas import Alphas
from proxytune.loading.prompting import PromptLike
from proxytune.proxy import Formula
from proxytune.records import Decoding, whole_number
from proxytune.vllm.checks import check_combination, check_decoding, check_one_prompt
from proxytune.vllm.engine import Engine
from proxytune.vllm.loop import EngineLoop
from proxytune.vllm.requests import Listed, rating, scoring

_ROUND = 256  # pairs that are scored between two looks at the results


class VllmGenerator(Generator):
    """A system that vLLM runs; see `Generator`, whose calls it has.

    It has no `system`: vLLM keeps the rows. `sibling` is this generator, since vLLM runs rows of
    several callers; one thread may use them.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        plan = engine.plan
        self.engine = engine
        self._describe(plan.models, plan.facts, plan.vocab_size, plan.alphas, plan.end)
        self.max_positions = plan.positions(engine.settings.max_model_len)

    @property
    def shows_members(self) -> bool:
        """False: vLLM gives the triple's log-probabilities alone."""
        return False

    def sibling(self) -> "VllmGenerator":
        """This generator: vLLM keeps the rows of several loops apart."""
        return self

    def encode(
        self,
        prompt: PromptLike | Mapping[str, Sequence[int]],
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, list[int]]:
        """A prompt as each member reads it; see `Generator.encode`.

        Raises:
            UserError: the members read different prompts, and the model runner is V1.
        """
        ids = super().encode(prompt, variables)
        check_one_prompt([ids], "the prompt")
        return ids

    def _check_call(self, decoding: Decoding, record: int, compare: bool) -> None:
        """Refuses what vLLM cannot do, too; see `Generator`."""
        if record or compare:
            raise UserError("vLLM records no trace; leave it out, or use engine=own")
        check_decoding("this call", decoding, self.engine.settings)
        super()._check_call(decoding, record, compare)

    def combination(
        self, formula: Formula | None = None, alpha: Alphas | None = None
    ) -> Combination | None:
        """Refuses every formula but proxy-tuning's, too; see `Generator`.

        Raises:
            UserError: besides, an own alpha where the model runner has one for all.
        """
        own = super().combination(formula, alpha)
        if own is not None:
            check_combination(own, self.alphas, self.engine.per_request)
        return own

    def loop(
        self, batch_size: int | Literal["auto"] = "auto", speculative: Speculative = "auto"
    ) -> EngineLoop:
        """A loop on the engine.

        Args:
            batch_size: rows given to vLLM at once; "auto" is as many as it runs.
            speculative: unused; `engine.speculative` is set when the engine is made.
        """
        if batch_size == "auto":
            return EngineLoop(self.engine, self.engine.max_rows)
        name = "batch_size, where it is not 'auto',"
        return EngineLoop(self.engine, whole_number(name, batch_size, 1))

    def logits(self, token_ids: Sequence[int] | Mapping[str, Sequence[int]]) -> torch.Tensor:
        """Refused: vLLM shows log-probabilities.

        Raises:
            UserError: always.
        """
        raise UserError("vLLM shows log-probabilities, no logits; use engine=own for them")

    def loglikelihood(
        self,
        pairs: Pairs,
        *,
        batch_size: int | Literal["auto"] = "auto",
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; see `Generator.loglikelihood`."""
        contexts = self._contexts(pairs)
        asked = [scoring(ids, list(given)) for ids, (_, given) in zip(contexts, pairs, strict=True)]
        outputs = []
        for start in range(0, len(asked), _ROUND):
            outputs += self.engine.finish(asked[start : start + _ROUND])
        continuations = [list(continuation) for _, continuation in pairs]
        pairs_of = zip(outputs, continuations, strict=True)
        return [_scored(*each, self.vocab_size) for each in pairs_of]

    def rate(
        self,
        prompts: Sequence[Prompt],
        own: Sequence[Combination | None],
        tops: Sequence[int],
    ) -> list[list[TokenLogprob | None]]:
        """Rates the tokens of several prompts; see `Generator.rate`."""
        asked = [rating(*each) for each in zip(prompts, own, tops, strict=True)]
        rated: list[list[TokenLogprob | None]] = []
        for prompt, top, output in zip(prompts, tops, self.engine.finish(asked), strict=True):
            ids = list(prompt["base"])
            places = output.prompt_logprobs[-len(ids) :][1:]
            listed = [Listed(place, self.vocab_size) for place in places]
            tokens = zip(listed, ids[1:], strict=True)
            rated.append([None, *(place.rate(token, top) for place, token in tokens)])
        return rated


def _scored(output: Any, continuation: list[int], vocab_size: int) -> tuple[float, bool]:
    """The sum of a continuation's log-probabilities, and whether greedy decoding writes it."""
    last = output.outputs[0]
    places = output.prompt_logprobs[len(output.prompt_logprobs) - len(continuation) + 1 :]
    places = [Listed(each, vocab_size) for each in places]
    read = list(zip(places, continuation[:-1], strict=True))
    total = sum(place.logprob(token) for place, token in read)
    total += Listed(last.logprobs[0], vocab_size).logprob(continuation[-1])
    greedy = last.token_ids[0] == continuation[-1]
    return total, greedy and all(place.best == token for place, token in read)
