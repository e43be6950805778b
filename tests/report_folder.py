"""Makes a results folder of invented completions for the tests of the report."""

import json
import random

from proxytune.files import write_jsonl
from proxytune.records import Completion, Example, MetricInfo, Prompt, Score
from proxytune.results import stats
from proxytune.results.folder import build_table

WORDS = ["Here", "is", "the", "answer", ":", "3", "+", "4", "=", "7", "apples", ".", "There", "are"]
RIGHT = {"base": 0.2, "expert": 0.5, "proxy": 0.6, "tuned": 0.7}


def tokenizer(folder):
    """A word-level tokenizer whose tokens carry the space in front of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁a": 1} | {"▁" + w: i + 2 for i, w in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)


def entry(token, generator):
    """One token of a trace, of a base that mostly wants another token."""
    base, proxy = generator.random() * 0.5, 0.5 + generator.random() * 0.5
    other = 2 + (token + 3) % len(WORDS)
    best = [[token, 0.9], [other, 0.05], [2, 0.01]]
    at_base = best if generator.random() < 0.7 else [[other, 0.6], [token, base], [2, 0.01]]
    return {
        "id": token,
        "p": {"system": proxy, "base": base, "expert": 0.9, "antiexpert": 0.1},
        "top": {"system": best, "base": at_base, "expert": best, "antiexpert": at_base},
    }


def make(folder, examples=30, tokens=12, limit=None, tasks=2):
    """Two tasks; the last example of the first has an unparsed base and a name to search for."""
    generator = random.Random(0)
    tokenizer(folder / "tokenizer")
    metrics, infos = [], {}
    plan = {
        "gsm8k": ("acc", MetricInfo("accuracy")),
        "toxigen": ("toxicity", MetricInfo("toxic", False)),
    }
    plan = dict(list(plan.items())[:tasks])
    # entries are drawn from a pool, so that a large folder is made in seconds
    pool = [entry(2 + i % len(WORDS), generator) for i in range(50 * len(WORDS))]
    for task, (metric, info) in plan.items():
        infos[task] = {metric: info}
        items = [
            Example(
                str(i), Prompt(raw=f"Question: what is {i} + {i}?\nAnswer:", user=""), str(2 * i)
            )
            for i in range(examples)
        ]
        items[-1] = Example(items[-1].id, Prompt(raw="Who met <b>Zanzibar</b>?", user=""), "x")
        write_jsonl(folder / task / "examples.jsonl", items)
        for system, share in RIGHT.items():
            completions, scores = [], []
            for i, item in enumerate(items):
                trace = generator.choices(pool, k=tokens)
                ids = [step["id"] for step in trace]
                text = " ".join(WORDS[token - 2] for token in ids)
                extra = {"trace": trace} if system == "proxy" else {}
                completions.append(Completion(item.id, 0, text, text, ids, "eos", extra=extra))
                value = float(i < share * examples)
                value = value if info.higher_is_better else 1 - value
                parsed = not (system == "base" and i == examples - 1)
                scores.append(Score(item.id, {metric: value}, "7", item.target, parsed))
            write_jsonl(folder / task / system / "completions.jsonl", completions)
            write_jsonl(folder / task / system / "scores.jsonl", scores)
            metrics += stats.metrics(task, system, scores)
    build_table(folder, metrics, infos, ("2", "13B"), limit)
    member = {"id": str(folder / "tokenizer"), "revision": None, "dtype": "float32"}
    run = {
        "name": "llama13b_chat",
        "config": {"name": "llama13b_chat", "alpha": 1.0, "triple": {"base": member}},
        "config_sha256": "c0ffee",
        "models": {"base": member},
        "datasets": {"gsm8k": "da7a"},
        "sessions": [
            {
                "command": ["run.py", "experiment=llama13b_chat"],
                "git": {"commit": "abc123", "dirty": True},
                "versions": {"torch": "2.13.0"},
                "hardware": {"platform": "Linux", "cores": 2, "gpus": []},
            }
        ],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder
