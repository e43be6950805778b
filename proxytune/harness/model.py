"""`ProxyTuneLM`: the class that lm-eval drives."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from proxytune.api import Generation, Generator, arguments, load
from proxytune.errors import UserError
from proxytune.harness.arguments import (
    alphas_of,
    batch_rows,
    formula_of,
    number,
    specs_of,
    template_variables,
    usable_device,
    with_alphas,
)
from proxytune.loading.formulas import name_of
from proxytune.loading.prompting import begun_answer, prompt_ids, render_messages
from proxytune.proxy import ProxyTunedModel, combine_logits
from proxytune.records import whole_number

_CHAT = "<|proxytune-conversation|>"  # begins a context that each member renders for itself
_DEFAULT_MAX_LENGTH = 2048  # lm-eval's, if neither the model nor the tokenizer has a limit
_BLOCK = 256  # log-likelihood requests between two writes to lm-eval's cache
# Sampling settings that tasks may give, by lm-eval's name, which is ours, too.
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
_THINKING = ("think_budget", "think_least", "think_word")  # ours alone
# Arguments of Hugging Face's generate that tasks set, and the values that change nothing here.
_HARMLESS = {"num_beams": 1, "use_cache": True, "early_stopping": False}

# One token sequence for every member, or role -> sequence.
Ids = list[int] | dict[str, list[int]]


class ProxyTuneLM(TemplateLM):
    """One of our generators as a model of lm-eval: log-likelihoods and completions.

    It encodes, truncates and cuts text as lm-eval's own `hf` model does, so that a single model
    gets the same numbers from both.

    Args:
        generator: a loaded system; without it, name the models:
        base, expert, antiexpert: paths or hub ids; the base alone is a single model.
        alpha: scale on (expert - antiexpert).
        vocabulary: see `proxytune.load`.
        formula: the name of one in `proxytune.formula`, or MODULE.FUNCTION; its settings are
            `formula_<name>` (formula=gated,formula_threshold=0.5).
        chat_template_args: variables of the members' chat templates, as lm-eval's `hf` has them.
        enable_thinking: one of them.
        dtype, device: of every member.
        batch_size: rows at once; "auto" goes by the free memory (lm-eval's own default is 1).
        max_batch_size: unused: lm-eval passes it, but "auto" needs no limit.
        max_length: context in tokens; None is the members' smallest.
        max_gen_toks: longest completion in tokens, for tasks that set none.
        seed: of sampled completions.
        progress: shows progress bars.
        members: `<pair>_expert`, `<pair>_antiexpert` and `<pair>_alpha` for each of several pairs;
            `<role>_<field>` for a field of `ModelSpec` (base_revision, expert_adapter,
            antiexpert_device, ...), and `<role>_format=chat` or `<role>_chat_template=NAME`;
            `<role>_think_end` and `<role>_template_kwargs` as in `PromptFormat`.

    Raises:
        UserError: a model cannot be found, vocabularies differ, or an argument is unknown.
    """

    def __init__(
        self,
        base: str | None = None,
        expert: str | None = None,
        antiexpert: str | None = None,
        alpha: float = 1.0,
        vocabulary: str = "strict",
        formula: str | None = None,
        chat_template_args: Mapping[str, Any] | str | None = None,
        enable_thinking: bool | None = None,
        *,
        generator: Generator | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        progress: bool = True,
        **members: Any,
    ) -> None:
        super().__init__()
        self.batch_size: int | Literal["auto"] = batch_rows(batch_size)
        self.seed = whole_number("seed", seed, 0)
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks, 1)
        if max_length is not None:
            whole_number("max_length", max_length, 1)
        if generator is None:
            ids = {"base": base, "expert": expert, "antiexpert": antiexpert}
            chosen = formula_of(formula, members)
            alphas = alphas_of(members)
            specs = specs_of(ids, dtype, usable_device(device), members)
            generator = load(
                **arguments(specs),
                alpha=with_alphas(specs, number("alpha", alpha), alphas),
                formula=chosen,
                vocabulary=vocabulary,
            )
        elif members or base is not None:
            raise UserError("give a loaded generator or the models' names, not both")
        self.generator = generator
        self.tokenizer = generator.members["base"].need_tokenizer()
        self.max_length = max_length or generator.max_positions or _DEFAULT_MAX_LENGTH
        self._progress = progress
        self._variables = template_variables(chat_template_args, enable_thinking)
        self._formats = generator.encoder.formats(self._variables)

    # -- text and tokens --------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with the tokenizer's BOS, unless the text begins with it."""
        return self._tokenize(string, self.tokenizer, add_special_tokens)

    def _tokenize(self, text: str, tokenizer: Any, special: bool | None = None) -> list[int]:
        if special is None:
            special = not text.startswith(tokenizer.decode(self.prefix_token_id))
        return prompt_ids(text, tokenizer, special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the context of a request, which each member renders for itself.

        If the last turn is the assistant's, the answer continues it, whatever the flag says.

        Raises:
            UserError: no member has a chat format.
        """
        if all(self._member(role).format.kind == "raw" for role in self.generator.roles):
            raise UserError(
                "no member has a chat format to apply: set one with <role>_format=chat or "
                "<role>_chat_template=NAME (in a triple's file: format: {kind: chat})"
            )
        return conversation(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The members' formats, for lm-eval's record of the run.

        Raises:
            UserError: a template is given by name; each member has its own.
        """
        if chat_template is False:
            return None
        if isinstance(chat_template, str):
            raise UserError(
                f"--apply_chat_template {chat_template}: name templates per member "
                f"(expert_chat_template={chat_template}), and give the flag without a name"
            )
        if len(self.generator.roles) == 1 and self._member("base").format.chat_template is None:
            return self.tokenizer.chat_template
        return json.dumps({role: str(self._formats[role]) for role in self.generator.roles})

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name and a hash of the formats; lm-eval names cached requests by it."""
        name = self.tokenizer.name_or_path.replace("/", "__")
        formats = [str(self._formats[role]) for role in self.generator.roles]
        return f"{name}__{hashlib.sha256(repr(formats).encode()).hexdigest()[:8]}"

    def _member(self, role: str) -> Any:
        return self.generator.members[role]

    def _texts(self, context: str) -> dict[str, str]:
        """Role -> the text that this member reads."""
        if not context.startswith(_CHAT):
            return dict.fromkeys(self.generator.roles, context)
        messages, end = json.JSONDecoder().raw_decode(context, len(_CHAT))
        rest = context[end:]  # text that a task appended to the conversation
        texts = {}
        for role in self.generator.roles:
            member = self._member(role)
            rendered = render_messages(messages, self._formats[role], member.need_tokenizer())
            texts[role] = rendered.text + rest
        return texts

    def _ids_of(self, texts: Mapping[str, str]) -> Ids:
        ids = {}
        for role, text in texts.items():
            tokenizer = self._member(role).tokenizer or self.tokenizer
            ids[role] = self._tokenize(text, tokenizer) or [self.prefix_token_id]
        shared = self.generator.vocabulary
        if shared is not None and shared.translations:
            return ids  # each in its own vocabulary
        return _shared(ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Any, list[int]]:
        """(context ids, continuation ids); the continuation's ids come from the base's text.

        Spaces at the end of the context move to the continuation, as everywhere in lm-eval.
        """
        texts = self._texts(context)
        base = texts["base"]
        spaces = base[len(base.rstrip()) :]
        if spaces:
            texts = {role: text.removesuffix(spaces) for role, text in texts.items()}
            continuation = spaces + continuation
        before = self.tok_encode(texts["base"])
        whole = self.tok_encode(texts["base"] + continuation)
        return self._ids_of(texts), whole[len(before) :]

    # -- the three requests --------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, Any, list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        with tqdm(
            total=len(requests),
            desc="log-likelihoods",
            disable=disable_tqdm or not self._progress,
        ) as bar:
            for block in _blocks(requests):
                pairs = [(self._fit(context, target), target) for _, context, target in block]
                answers = self.generator.loglikelihood(pairs, batch_size=self.batch_size)
                for (request, _, _), answer in zip(block, answers, strict=True):
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, answer)
                results += answers
                bar.update(len(block))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts; one longer than the context is cut into windows."""
        totals = []
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = _args(request)
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in pieces:
                windows.append((None, *make_disjoint_window(piece)))
                owners.append(index)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        sums = defaultdict[int, float](float)
        for index, (value, _) in zip(owners, scored, strict=True):
            sums[index] += value
        for index, request in enumerate(requests):
            totals.append(sums[index])
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[index])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, cut before the first stop string.

        Raises:
            UserError: a task asks for a kind of decoding that we do not have.
        """
        groups = defaultdict[str, list[int]](list)
        for index, request in enumerate(requests):
            groups[json.dumps(_args(request)[1], sort_keys=True, default=str)].append(index)
        texts: dict[int, str] = {}
        with tqdm(
            total=len(requests), desc="completions", disable=disable_tqdm or not self._progress
        ) as bar:
            for indices in groups.values():
                for index, text in self._generate_group(requests, indices):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return [texts[index] for index in range(len(requests))]

    def _generate_group(
        self, requests: list[Instance], indices: list[int]
    ) -> Iterator[tuple[int, str]]:
        """Completes requests that share their settings."""
        settings, stop = self._decoding(_args(requests[indices[0]])[1])
        room = self.max_length - settings["max_new_tokens"]
        if room < 1:
            raise UserError(
                f"the task generates up to {settings['max_new_tokens']} tokens, which leaves no "
                f"room for a prompt in a context of {self.max_length}; say max_gen_toks=... in "
                "--gen_kwargs (or max_length=... in --model_args)"
            )
        prompts = []
        for index in indices:
            ids = self._ids_of(self._texts(_args(requests[index])[0]))
            prompts.append(_per_role(ids, lambda tokens: tokens[-room:]))
        generations = self.generator.generate(
            prompts,
            **settings,
            stop=stop,
            seed=self.seed,
            batch_size=self.batch_size,
            prefixes=[_begun(_args(requests[index])[0]) for index in indices],
        )
        for index, generation in zip(indices, generations, strict=True):
            yield index, self._text(generation, stop)

    def _decoding(self, gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's generation_kwargs as arguments of `Generator.generate`, and stop strings."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        stop = [string for string in wanted.pop("until") if string]
        sampled = wanted.pop("do_sample")
        sampling = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
        settings: dict[str, Any] = {"max_new_tokens": wanted.pop("max_gen_toks")}
        if sampled:  # else greedy, whatever the sampling settings are
            settings["temperature"] = 1.0
            settings |= {name: _SAMPLING[name](value) for name, value in sampling.items()}
        settings |= {name: wanted.pop(name) for name in _THINKING if name in wanted}
        settings["repetition_penalty"] = float(wanted.pop("repetition_penalty", 1.0))
        for name, value in wanted.items():
            if _HARMLESS.get(name, object()) != value:
                raise UserError(f"generation_kwargs {name}={value!r} cannot be done here")
        return settings, stop

    def _text(self, generation: Generation, stop: Sequence[str]) -> str:
        """The completion as lm-eval's `hf` model cuts it; of one that thinks, its answer.

        Stop strings within a thought end nothing.
        """
        if "thought" in generation.extra:
            return generation.text
        text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        for string in stop:
            text = text.split(string)[0]
        return text

    def _fit(self, context: Ids, target: list[int]) -> Ids:
        """Drops the beginning of a context that is too long.

        The target's last token is predicted but not read, so it needs no room.
        """
        room = self.max_length + 1 - len(target)
        if not target or room < 1:
            raise UserError(
                f"a continuation of {len(target)} tokens cannot be scored in a context of "
                f"{self.max_length}"
            )
        return _per_role(context, lambda tokens: tokens[-room:])

    # -- lm-eval's record of the run --------------------

    def get_model_info(self) -> dict[str, Any]:
        """The models and alpha, for lm-eval's results file."""
        members = {role: str(self._member(role).spec) for role in self.generator.roles}
        alphas = dict(self.generator.alphas)
        alpha = alphas if len(alphas) > 1 else next(iter(alphas.values()), None)
        info: dict[str, Any] = {"proxytune_members": members, "proxytune_alpha": alpha}
        if self._variables:
            info["proxytune_chat_template_args"] = self._variables
        system = getattr(self.generator, "system", None)  # vLLM's generator has none
        if isinstance(system, ProxyTunedModel) and system.formula is not combine_logits:
            settings = getattr(system.formula, "keywords", {})
            info["proxytune_formula"] = {"name": name_of(system.formula), **settings}
        shared = self.generator.vocabulary
        if shared is not None and shared.to_dict() is not None:
            info["proxytune_vocabulary"] = shared.to_dict()
        if self.generator.end is not None:
            info["proxytune_end_tokens"] = self.generator.end.to_dict()
        return info


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """A context that each member renders for itself."""
    return _CHAT + json.dumps(messages, ensure_ascii=False)


def _begun(context: str) -> str:
    """The text with which a conversation lets the answer begin; "" for any other context."""
    if not context.startswith(_CHAT):
        return ""
    return begun_answer(json.JSONDecoder().raw_decode(context, len(_CHAT))[0])


def _args(request: Instance) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", request.args)


def _shared(ids: dict[str, list[int]]) -> Ids:
    """One sequence if all members read the same; else role -> sequence."""
    first = ids["base"]
    return first if all(each == first for each in ids.values()) else ids


def _per_role(ids: Ids, change: Callable[[list[int]], list[int]]) -> Ids:
    if isinstance(ids, dict):
        return {role: change(tokens) for role, tokens in ids.items()}
    return change(ids)


def _blocks(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(requests), _BLOCK):
        yield requests[start : start + _BLOCK]
