"""What tests/test_vllm.py asks of one vLLM engine, in a process of its own.

    python -m tests.vllm_cases FOLDER '{"tensor_parallel_size": 2}' '[["greedy", ...], ...]'

Prints one JSON object: case -> "" where the engine and proxytune's own agree, else the difference.
Both model runners, and every way to run an engine, are asked the same; an engine takes a minute to
load, so one process asks all of its cases.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import proxytune
from proxytune.records import make_decoding
from proxytune.vllm.settings import EngineSettings
from tests.tiny import save_tiny

ROLES = ("base", "expert", "antiexpert")
TEXTS = ("Natalia sold clips", "What is the capital of France?", "def add(a, b):\n", "42", " ")


def family(folder: Path) -> None:
    """A padded base, helpers of other sizes, and an expert whose cache pages differ from theirs."""
    small = {"hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    odd = {"hidden": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "layers": 3}
    save_tiny(folder / "base", seed=1, hidden=128, vocab=320, scale=4.0)
    save_tiny(folder / "expert", seed=2, scale=6.0, **small)
    save_tiny(folder / "antiexpert", seed=3, scale=6.0, **small)
    save_tiny(folder / "odd", seed=5, scale=4.0, **odd)
    save_tiny(folder / "even", seed=6, hidden=128, scale=4.0)
    _adapter(folder / "antiexpert", folder / "lora")


def _adapter(model: Path, folder: Path) -> None:
    """Writes a LoRA of a model that changes its text."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(9)
    whole = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(whole, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    adapted.save_pretrained(folder)


def specs(
    folder: Path, expert: str = "expert", base: str = "base"
) -> dict[str, proxytune.ModelSpec]:
    names = {"base": base, "expert": expert, "antiexpert": "antiexpert"}
    found = {r: proxytune.ModelSpec(str(folder / n), dtype="float32") for r, n in names.items()}
    if expert == "lora":
        found["expert"] = replace(found["antiexpert"], adapter=str(folder / "lora"))
    return found


def one_prompt_each(count: int = 12) -> list[dict[str, list[int]]]:
    """The same ids for every member."""
    rng = random.Random(7)
    found = [[rng.randrange(3, 299) for _ in range(rng.randrange(1, 70))] for _ in range(count)]
    return [dict.fromkeys(ROLES, ids) for ids in found]


def own_prompts(count: int = 10) -> list[dict[str, list[int]]]:
    """Other ids, and other lengths, for each member."""
    rng = random.Random(4)
    return [
        {role: [rng.randrange(3, 299) for _ in range(rng.randrange(1, 60))] for role in ROLES}
        for _ in range(count)
    ]


class Cases:
    """Every case is a method that gives the same from both generators."""

    def __init__(self, prompts: list[Any]) -> None:
        self.prompts = prompts

    def greedy(self, g: Any) -> Any:
        return g.generate(self.prompts, max_new_tokens=20)

    def sampled(self, g: Any) -> Any:
        return g.generate(self.prompts, max_new_tokens=10, temperature=0.8, top_p=0.9, n=3, seed=11)

    def penalised(self, g: Any) -> Any:
        settings = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}
        return g.generate(self.prompts, max_new_tokens=12, temperature=0.8, **settings)

    def lists(self, g: Any) -> Any:
        banned = {"banned": ["a"], "banned_first": ["e"], "stop": ["o"]}
        one = g.generate(self.prompts, max_new_tokens=12, temperature=1.0, **banned)
        return one + g.generate(self.prompts, max_new_tokens=4, choices=["1", "2", "x"])

    def filters(self, g: Any) -> Any:
        return g.generate(self.prompts, max_new_tokens=8, temperature=1.5, top_k=5, min_p=0.02)

    def repeats(self, g: Any) -> Any:
        """Whether equal seeds draw equal samples, and other seeds others: of any sampler."""
        settings: Any = {"max_new_tokens": 8, "temperature": 1.0}
        first, again, other = (g.generate(self.prompts, seed=s, **settings) for s in (1, 1, 2))
        return [first == again, first != other]

    def context_ends(self, g: Any) -> Any:
        prompts = [dict.fromkeys(ROLES, [5] * 505), dict.fromkeys(ROLES, [9] * 511)]
        return g.generate(prompts, max_new_tokens=20, ignore_eos=True)

    def texts(self, g: Any) -> Any:
        return [*g.generate(list(TEXTS), max_new_tokens=12), "".join(g.stream(TEXTS[0]))]

    def alphas(self, g: Any) -> Any:
        found: dict[int, Any] = {}
        loop = g.loop()
        for i, request in enumerate(g.requests(self.prompts, make_decoding(max_new_tokens=10))):
            loop.add(
                replace(request, combination=g.combination(alpha=(0.4, 1.0, None, -0.3)[i % 4]))
            )
        while loop.busy:
            found |= {each.index: each for each in loop.step()}
        return [found[i] for i in range(len(self.prompts))]

    def cancelled(self, g: Any) -> Any:
        loop, found = g.loop(batch_size=4), []
        for request in g.requests(self.prompts, make_decoding(max_new_tokens=10)):
            loop.add(request)
        loop.step()
        loop.cancel(1)
        loop.cancel(7)
        while loop.busy:
            found += loop.step()
        return sorted(found, key=lambda each: each.index)

    def paused(self, g: Any) -> Any:
        """Some requests are set aside; the others end meanwhile, and all write the same."""
        loop, found = g.loop(batch_size=4), []
        for request in g.requests(self.prompts, make_decoding(max_new_tokens=10)):
            loop.add(request)
        loop.step()
        loop.pause([0, 1, 9])
        counts = [loop.paused]
        while loop.busy:
            found += loop.step()
        counts.append(len(found))
        loop.resume([0, 1, 9])
        while loop.busy:
            found += loop.step()
        return [counts, loop.paused, sorted(found, key=lambda each: each.index)]

    def likelihoods(self, g: Any) -> Any:
        pairs = [(p, [5 + i, 7, 9][: 1 + i % 3]) for i, p in enumerate(self.prompts)]
        greedy = [each.token_ids for each in g.generate(self.prompts, max_new_tokens=4)]
        pairs += [(p, ids) for p, ids in zip(self.prompts, greedy, strict=True) if ids]
        pairs.append((dict.fromkeys(ROLES, [5] * 505), list(range(3, 11))))  # the context is full
        return g.loglikelihood(pairs)

    def ratings(self, g: Any) -> Any:
        prompts = [each for each in self.prompts if len(set(map(tuple, each.values()))) == 1][:3]
        return [
            [token and (token.id, token.rank, token.logprob, *token.top) for token in rated]
            for rated in g.rate(prompts, [None] * len(prompts), [0, 1, 5][: len(prompts)])
        ]

    def listed(self, g: Any) -> Any:
        """Log-probabilities of generated tokens, as the server asks for them."""
        found: list[Any] = []
        (request,) = g.requests(self.prompts[:1], make_decoding(max_new_tokens=6))

        def watch(sample: int, token: int, text: str, rating: Any) -> None:
            rated = rating.of(3)
            found.append([sample, token, text, rated.logprob, rated.rank, rated.top])

        loop = g.loop()
        loop.add(replace(request, on_token=watch, top=3))
        while loop.busy:
            loop.step()
        return found


def difference(got: Any, want: Any, where: str = "") -> str:
    """The first difference of two results; numbers may differ by 1e-4."""
    if isinstance(want, list | tuple):
        if len(got) != len(want):
            return f"{where}: {len(got)} for {len(want)}"
        found = (difference(g, w, f"{where}[{i}]") for i, (g, w) in enumerate(zip(got, want)))  # noqa: B905
        return next((each for each in found if each), "")
    if isinstance(want, float):
        return "" if abs(got - want) < 1e-4 else f"{where}: {got} for {want}"
    return "" if got == want else f"{where}: {got} for {want}"


def main(folder: str, settings: str, names: str) -> None:
    place = Path(folder)
    given = json.loads(settings)
    members = given.pop("expert", "expert"), given.pop("base", "base")
    if not (place / "odd").exists():
        family(place)
    own = proxytune.load(**specs(place, *members))
    from proxytune.vllm.pool import load_engine  # the file is imported where vLLM is missing, too

    theirs = load_engine(specs(place, *members), EngineSettings(name="vllm", **given))
    kinds: dict[str, Callable[[], list[Any]]] = {"one": one_prompt_each, "own": own_prompts}
    results = {}
    for kind, case in json.loads(names):
        run = getattr(Cases(kinds[kind]()), case)
        results[f"{kind}-{case}"] = difference(run(theirs), run(own))
    theirs.engine.close()
    print("RESULTS", json.dumps(results), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(*sys.argv[1:])
