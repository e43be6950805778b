"""`Generator`, the result of `proxytune.load`: it gives completions, logits and likelihoods."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, Unpack

import torch

from proxytune.engine import score
from proxytune.engine.base_loop import Loop
from proxytune.engine.combining import Combination
from proxytune.engine.generation import Generation, generation_of
from proxytune.engine.logprobs import TokenLogprob
from proxytune.engine.loop import DecodeLoop
from proxytune.engine.memory import row_budget
from proxytune.engine.penalties import NO_RAW_LOGITS
from proxytune.engine.rows import Request, longest
from proxytune.engine.sampling import Sampler
from proxytune.engine.speculation import Pace
from proxytune.engine.system import DraftingSystem, Facts, Prompt, System
from proxytune.errors import UserError
from proxytune.loading.encoding import Encoder
from proxytune.loading.formulas import Alphas
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptLike, begun_answer, thinking
from proxytune.loading.requested import combination_of
from proxytune.loading.samplers import Samplers, thought_for
from proxytune.loading.vocabulary import Vocabulary
from proxytune.proxy import Formula, ProxyTunedModel, SharedEnd, combine_logits, traits_of
from proxytune.records import (
    Decoding,
    DecodingSettings,
    make_decoding,
    whole_number,
)

Prompts = Sequence[PromptLike | Mapping[str, Sequence[int]]]
Pairs = Sequence[tuple[PromptLike | Mapping[str, Sequence[int]], Sequence[int]]]
Speculative = Literal["auto"] | bool | int


class Generator:
    """A loaded system: a single model, or several that decode together.

    Args:
        members: role -> loaded model.
        system: built from them.
        rebuild: builds it once more, with rows of its own.
        vocabulary: of a base and its helpers; None for a single model.

    Attributes:
        members: role -> loaded model.
        system: the members as a system, which the decode loop drives.
        base: what is known of the base.
        formula: combines the members' logits; None in a single model.
        alphas: the formula's alphas by their names; none in a single model.
        end: the triple's `SharedEnd`; None where it has none.
        roles: ("base",), ("base", "expert", "antiexpert"), or those that another formula needs;
            the keys of per-role prompts.
        vocabulary: what the members have in common, and what not; None for a single model.
        encoder: encodes prompts for the members.
        vocab_size: how many token ids all members share.
        tokenizer: the base's; None for a model that came without one.
        max_positions: the longest row in tokens that all members can read; None for no limit.
        eos_ids: tokens that end a completion.
        sampler_type: what chooses tokens.
    """

    sampler_type: type[Sampler] = Sampler

    def __init__(
        self,
        members: Mapping[str, LoadedModel],
        system: System,
        rebuild: Callable[[], System],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.system = system
        self._rebuild = rebuild
        triple = system if isinstance(system, ProxyTunedModel) else None
        end = triple and triple.end
        self._describe(members, system.members, system.vocab_size, system.alphas, end, vocabulary)
        self.formula = triple and triple.formula
        self._gates = triple is not None and traits_of(triple.formula).gates

    def _describe(
        self,
        members: Mapping[str, LoadedModel],
        facts: Mapping[str, Facts],
        vocab_size: int,
        alphas: Mapping[str, float],
        end: SharedEnd | None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Sets every attribute but `system`: what another engine's generator has, too."""
        self.members = dict(members)
        self.vocabulary = vocabulary
        translations = {} if vocabulary is None else vocabulary.translations
        self.encoder = Encoder(self.members, vocab_size, translations)
        self.base = facts["base"]
        self.alphas = alphas
        self.formula: Formula | None = combine_logits if len(members) > 1 else None
        self._gates = False
        self.end = end
        self.roles = tuple(role for role in members if role != "draft")
        self.vocab_size = vocab_size
        self.tokenizer = members["base"].tokenizer
        self._paces: dict[int | None, Pace] = {}
        self._samplers = Samplers(members["base"], vocab_size, self.sampler_type)
        limits = [each.max_positions for each in facts.values()]
        self.max_positions = min((limit for limit in limits if limit), default=None)
        alike = (each for role, each in members.items() if role not in translations)
        self.eos_ids = frozenset[int]().union(*(each.eos_ids for each in alike))

    def sibling(self) -> "Generator":
        """A generator of the same models with rows of its own: both can decode at the same time."""
        return Generator(self.members, self._rebuild(), self._rebuild, self.vocabulary)

    def generate(
        self,
        prompts: Prompts,
        *,
        seed: int = 0,
        speculative: Speculative = "auto",
        batch_size: int | Literal["auto"] = "auto",
        sample_keys: Sequence[str] | None = None,
        on_finish: Callable[[Generation], None] | None = None,
        record: bool | int | None = None,
        compare: bool = False,
        prefixes: Sequence[str] | None = None,
        **settings: Unpack[DecodingSettings],
    ) -> list[Generation]:
        """Continues every prompt `n` times.

        Args:
            prompts: each a string (the same text for every member), token ids (the same for
                every member), chat messages (each member renders them with its own template), or a
                mapping role -> token ids.
            seed: of sampling. A sample depends on the seed, the prompt's key and its own number
                alone, not on the batch or the strategy.
            speculative: "auto" drafts blocks if measurements show that this is faster; False
                decodes in lockstep; a number drafts so many tokens each time. The text is the same.
            batch_size: how many rows run at once; "auto" depends on the free memory.
            sample_keys: the prompts' names in the random streams; by default a hash of each prompt.
            on_finish: called with every generation as soon as it ends.
            record: fills `Generation.extra["trace"]` with so many top tokens (True: 5) per member;
                decodes in lockstep.
            compare: fills `Generation.extra["agreed"]`.
            prefixes: text that begins each prompt's answer after a thought; used where a member
                thinks.
            settings: the fields of `Decoding`, in short: max_new_tokens per sample (256 by
                default; fewer if the context of a member ends before), temperature (0, greedy),
                top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                ignore_eos, n (samples per prompt), and lists of strings: `stop` ends a completion,
                the single tokens of `banned` and `banned_first` are not chosen (anywhere, as the
                first token), those of `choices` are the only ones chosen.

        Returns:
            One generation per prompt and sample: all samples of the first prompt, then those of
            the next.

        Raises:
            UserError: a setting or a prompt is impossible; nothing has been generated then.
        """
        decoding = make_decoding(**settings)
        requests = self.requests(
            prompts,
            decoding,
            seed=seed,
            sample_keys=sample_keys,
            record=record,
            compare=compare,
            prefixes=prefixes,
        )
        results: list[Generation | None] = [None] * (len(prompts) * decoding.n)

        def take(generation: Generation) -> None:
            results[generation.prompt_index * decoding.n + generation.sample] = generation
            if on_finish is not None:
                on_finish(generation)

        self._complete(requests, batch_size, speculative, take)
        return [generation for generation in results if generation is not None]

    def _complete(
        self,
        requests: Sequence[Request],
        batch_size: int | Literal["auto"],
        speculative: Speculative,
        take: Callable[[Generation], None],
    ) -> None:
        """Continues requests; `take` gets each generation as soon as it ends."""
        for finished in self.loop(batch_size, speculative).run(requests):
            take(generation_of(finished))

    def stream(
        self,
        prompt: PromptLike | Mapping[str, Sequence[int]],
        *,
        seed: int = 0,
        speculative: Speculative = "auto",
        sample_key: str | None = None,
        **settings: Unpack[DecodingSettings],
    ) -> Iterator[str]:
        """Yields one completion piece by piece; the pieces make up `Generation.text`.

        Text is held back as long as later tokens may make it the beginning of a stop string.

        Args:
            prompt: as for `generate`.
            seed: as for `generate`.
            speculative: as for `generate`.
            sample_key: the prompt's name in the random stream.
            settings: as for `generate`, except that n is 1.
        """
        decoding = make_decoding(**settings)
        if decoding.n != 1:
            raise UserError(f"stream writes one sample, not n={decoding.n}: use generate")
        keys = None if sample_key is None else [sample_key]
        pieces: list[str] = []
        (request,) = self.requests([prompt], decoding, seed=seed, sample_keys=keys)
        loop = self.loop(1, speculative)
        loop.add(replace(request, on_token=lambda sample, token, text, _: pieces.append(text)))
        try:
            while loop.busy:
                loop.step()
                piece = "".join(pieces)
                pieces.clear()
                if piece:
                    yield piece
        finally:
            loop.clear()

    def requests(
        self,
        prompts: Prompts,
        decoding: Decoding,
        *,
        seed: int = 0,
        sample_keys: Sequence[str] | None = None,
        record: bool | int | None = None,
        compare: bool = False,
        prefixes: Sequence[str] | None = None,
    ) -> list[Request]:
        """Checks and encodes prompts for a `DecodeLoop`.

        Args:
            prompts: as for `generate`.
            decoding: the settings of all prompts.
            seed: as for `generate`.
            sample_keys: as for `generate`.
            record: as for `generate`.
            compare: as for `generate`.
            prefixes: as for `generate`.

        Raises:
            UserError: a prompt cannot be continued.
        """
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
            raise UserError("prompts must be a list; for one prompt, give [prompt]")
        if sample_keys is not None and len(sample_keys) != len(prompts):
            raise UserError(f"{len(sample_keys)} sample_keys for {len(prompts)} prompts")
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise UserError(f"seed must be a whole number, not {seed!r}")
        top = 5 if record is True else whole_number("record", record or 0, 0)
        self._check_call(decoding, top, compare)
        sampler = self._samplers.of(decoding)
        thinks = thinking({role: self.members[role].format for role in self.roles})
        phases = self._samplers.by_phase(decoding, self.members[thinks[0]]) if thinks else {}
        seen: Counter[str] = Counter()
        requests = []
        for index, prompt in enumerate(prompts):
            ids = self.encode(prompt)
            room = self._room(index, ids)
            thought = None
            if thinks:
                prefix = prefixes[index] if prefixes else begun_answer(prompt)
                thought = thought_for(self.members, thinks, ids, prefix, decoding)
            if sample_keys is not None:
                key = sample_keys[index]
            else:
                alike = self.encoder.with_base_ids(ids)
                key = hashlib.sha256(repr(sorted(alike.items())).encode()).hexdigest()
                seen[key] += 1
                key += f"#{seen[key]}"
            requests.append(
                Request(
                    index=index,
                    prompt=ids,
                    context=ids["base"],
                    key=key,
                    seed=seed,
                    decoding=decoding,
                    sampler=sampler,
                    eos_ids=frozenset() if decoding.ignore_eos else self.eos_ids,
                    max_new_tokens=min(decoding.max_new_tokens, room),
                    tokenizer=self.tokenizer,
                    record=top,
                    count_touched=self._gates,
                    compare=compare,
                    thought=thought,
                    samplers=phases,
                )
            )
        return requests

    def loop(
        self, batch_size: int | Literal["auto"] = "auto", speculative: Speculative = "auto"
    ) -> Loop:
        """A new decode loop on this system, for callers that add requests themselves (a server).

        Only one loop may run on a generator at a time.

        Args:
            batch_size: as for `generate`.
            speculative: as for `generate`.
        """
        if batch_size != "auto":
            batch_size = whole_number("batch_size, where it is not 'auto',", batch_size, 1)
        return DecodeLoop(self.system, self._rows(batch_size), self._pace(speculative))

    @property
    def can_draft(self) -> bool:
        """Whether a small model can draft for this system."""
        return self._pace(True) is not None

    def logits(self, token_ids: Sequence[int] | Mapping[str, Sequence[int]]) -> torch.Tensor:
        """The system's next-token logits after every position, [tokens, vocab], float32.

        Args:
            token_ids: the same for every member, or role -> ids of equal length.

        Raises:
            UserError: the base is behind an API that lists only some tokens, or the members'
                ids differ after the first.
        """
        self._refuse_partial()
        ids = self.encoder.with_base_ids(self.encode(token_ids))
        self._room(0, self.encoder.grown(ids, []))
        return score.sequence_logits(self.system, ids)

    def loglikelihood(
        self,
        pairs: Pairs,
        *,
        batch_size: int | Literal["auto"] = "auto",
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations.

        Args:
            pairs: (context, continuation token ids); contexts as the prompts of `generate`.
            batch_size: as for `generate`.

        Returns:
            For each pair: the sum of the continuation's log-probabilities, and whether each of its
            tokens is the likeliest one.

        Raises:
            UserError: the base is behind an API that lists only some tokens, or a pair is too
                long.
        """
        self._refuse_partial()
        contexts = self._contexts(pairs)
        continuations = [list(continuation) for _, continuation in pairs]
        return score.loglikelihoods(self.system, contexts, continuations, self._rows(batch_size))

    def rate(
        self,
        prompts: Sequence[Prompt],
        own: Sequence[Combination | None],
        tops: Sequence[int],
    ) -> list[list[TokenLogprob | None]]:
        """Rates the tokens of several prompts, all read together; see `score.prompt_logprobs`."""
        return score.prompt_logprobs(self.system, prompts, own, tops)

    def encode(
        self,
        prompt: PromptLike | Mapping[str, Sequence[int]],
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, list[int]]:
        """A prompt as each member reads it: role -> token ids; see `Encoder.encode`."""
        return self.encoder.encode(prompt, self.max_positions, variables)

    @property
    def shows_members(self) -> bool:
        """Whether each member's log-probabilities of a chosen token can be asked for."""
        return len(self.roles) > 1 and all(each.member is None for each in self.members.values())

    def combination(
        self, formula: Formula | None = None, alpha: Alphas | None = None
    ) -> Combination | None:
        """A request's own formula and alphas; None where it has neither.

        Args:
            formula: one of `formula.shipped`; None takes the system's.
            alpha: see `combination_of`; None takes the system's.

        Raises:
            UserError: this is a single model, or see `combination_of`.
        """
        if formula is None and alpha is None:
            return None
        if self.formula is None:
            name = "alpha" if formula is None else "formula"
            raise UserError(f"{name} needs a triple; this model is a single one")
        system = Combination(self.formula, self.roles, self.alphas)
        other = self.members.get("antiexpert")
        two_prompts = other is not None and other.model is self.members["base"].model
        few = not self.base.complete
        return combination_of(formula, alpha, system, few=few, two_prompts=two_prompts)

    def _check_call(self, decoding: Decoding, record: int, compare: bool) -> None:
        """Refuses settings that this system cannot serve.

        Args:
            decoding: the settings.
            record: how many tokens a trace lists; 0 for no trace.
            compare: whether the members' own choices are counted.
        """
        if decoding.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer: give load(..., tokenizer=...)")
        if decoding.repetition_penalty != 1 and not self.base.raw_logits:
            raise UserError(NO_RAW_LOGITS)

    def _contexts(self, pairs: Pairs) -> list[dict[str, list[int]]]:
        """The encoded contexts of pairs, each with room for its continuation.

        Raises:
            UserError: a context cannot be read, or a pair is too long.
        """
        contexts = [self.encode(context) for context, _ in pairs]
        for index, (ids, (_, continuation)) in enumerate(zip(contexts, pairs, strict=True)):
            self._room(index, self.encoder.grown(ids, continuation[:-1]), 0)
        return contexts

    def _refuse_partial(self) -> None:
        """Raises a ValueError if the base does not give the logit of every token."""
        if not self.base.complete:
            raise UserError(
                "log-likelihoods need the log-probability of every token, and the API of the base "
                "shows the likeliest only; use a server that shows all (triple.base.api."
                "top_logprobs=-1) or a task that generates"
            )

    def _room(self, index: int, ids: Mapping[str, Sequence[int]], need: int = 1) -> int:
        """How many tokens still fit after a prompt.

        Args:
            index: the prompt's number, for the message.
            ids: role -> token ids.
            need: how many must fit.

        Raises:
            UserError: fewer than that fit.
        """
        length = longest(ids)
        room = (self.max_positions or length + 2**31) - length
        if room < need:
            raise UserError(
                f"prompt {index} is {length} tokens long, with {need} to come; the models read at "
                f"most {self.max_positions}"
            )
        return room

    def _rows(self, batch_size: int | Literal["auto"]) -> Callable[[int], int]:
        """How many rows of a given length run at once; see `memory.row_budget`."""
        return row_budget(self.system.members.values(), batch_size)

    def _pace(self, speculative: Speculative) -> Pace | None:
        """The pace of speculative decoding; None for lockstep. Calls share what it has learnt."""
        system = self.system
        if speculative is False or not isinstance(system, DraftingSystem) or not system.drafter:
            return None
        adapts = speculative is True or speculative == "auto"  # 1 == True, but drafts one token
        name = "speculative, where it is neither 'auto' nor a truth value,"
        fixed = None if adapts else whole_number(name, speculative, 1)
        if fixed not in self._paces:
            pace = system.members["base"].pace(fixed)
            if pace is None:
                return None
            self._paces[fixed] = pace
        return self._paces[fixed]
