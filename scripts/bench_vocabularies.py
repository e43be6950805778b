"""How much of one vocabulary another one has, and what its translation costs per step.

    python scripts/bench_vocabularies.py BASE EXPERT [--text FILE] [--rows N]

BASE and EXPERT are folders or hub ids of tokenizers. It prints the share of the base's ids with a
counterpart; over a text, the share of the base's tokens that have one and how many of the expert's
tokens each is; and the time of translating a step, beside the time of a lockstep step of three
models of 100M weights. The probability that finds no counterpart depends on models, and is reported
by runs; a text's share of tokens is what a perfect expert's would be.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from proxytune.files import ROOT

LAYERS = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}  # with the embedding, 100M weights
PROMPT = 128  # tokens that a row has read when its step is timed


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("expert")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--no-steps", action="store_true", help="times no models")
    args = parser.parse_args()
    _measure(args.base, args.expert, args.text, args.rows, steps=not args.no_steps)


def _measure(base_name: str, expert_name: str, text: Path, rows: int, *, steps: bool) -> None:
    """Prints what one pair of tokenizers costs and lacks."""
    # imported here, so that --help comes at once
    import torch
    from transformers import AutoTokenizer

    from proxytune.loading.translation import Tokens, counterparts, make_translation

    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (base_name, expert_name)]
    start = time.perf_counter()
    base, own = (Tokens(t, len(t), [t.eos_token_id]) for t in tokenizers)
    made = make_translation(base, own, tokenizers[0].eos_token_id)
    print(f"made in {time.perf_counter() - start:.1f} s")
    known = counterparts(made)
    print(f"ids of the base with a counterpart: {known['ids']:,} of {base.size:,}", end="")
    print(f" ({known['share']:.1%})")
    _of_a_text(text.read_text(), tokenizers, made)
    with torch.inference_mode():
        _times(base.size, own.size, made, rows, steps=steps)


def _of_a_text(text: str, tokenizers: list, made) -> None:
    """Prints how the tokens of a text correspond."""
    ids, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in tokenizers)
    lacking = set(made.missing)
    read = [own for token in ids for own in made.read(token)]
    print(f"of a text's {len(ids):,} tokens, {1 - sum(i in lacking for i in ids) / len(ids):.1%}")
    print(f"the expert reads {len(read):,} tokens for them; by its tokenizer {len(theirs):,}")
    reached = set(made.source.tolist()) | {i for each in made.several.values() for i in each}
    lost = sum(token not in reached for token in theirs) / len(theirs)
    print(f"of the expert's tokens of that text, the base lacks {lost:.1%}")


def _times(size: int, own_size: int, made, rows: int, *, steps: bool) -> None:
    """Prints the time of a step's translation, for expert and antiexpert, and of a whole step."""
    import torch

    from proxytune.engine.unshifted import Unshifted

    logits = {
        role: torch.randn(rows, size if role == "base" else own_size)
        for role in ("base", "expert", "antiexpert")
    }
    roles = ("expert", "antiexpert")
    gaps = Unshifted(dict.fromkeys(roles, made.missing), roles) if made.lossy else None

    def translate() -> None:
        seen = {"base": logits["base"]} | {r: made.logits(logits[r]) for r in roles}
        if gaps is not None:
            gaps.leave(seen)

    cost = _median_ms(translate, 30)
    print(f"translation of a step of {rows} rows: {cost:.2f} ms")
    if steps:
        step = sum(_step_ms(each, rows) for each in (size, own_size, own_size))
        print(f"a lockstep step of three models of 100M weights: {step:.1f} ms")
        print(f"share: {cost / step:.1%}")


def _step_ms(vocab: int, rows: int) -> float:
    """The time of one step of a random Llama with this vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from proxytune.members.choose import make_member

    sizes: dict[str, Any] = {**LAYERS, **HEADS}
    config = LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, **sizes)
    member = make_member(AutoModelForCausalLM.from_config(config).eval(), vocab)
    member.prefill([list(range(PROMPT))] * rows)
    tokens = torch.zeros(rows, dtype=torch.long)
    return _median_ms(lambda: member.step(tokens), 12)


def _median_ms(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds[2:])


if __name__ == "__main__":
    main()
