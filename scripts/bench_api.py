"""Requests per generated token with a base behind an API: drafted blocks against single tokens.

    python scripts/bench_api.py [--prompts 24] [--json results/bench/api.json]

This process serves the pocket family's base over HTTP; the server lists 20 tokens per position.
Both ways write the same text, which is checked. docs/black_box.md discusses the result.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import proxytune
from proxytune.cli.guard import guarded
from proxytune.config.schema import register
from proxytune.errors import UserError
from proxytune.files import ROOT

TASKS = "[pocket_gsm8k,pocket_triviaqa,pocket_truthfulqa_open,pocket_humaneval]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=24, help="per task")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    import transformers

    from proxytune import provenance

    transformers.logging.set_verbosity_error()
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rows = measure(options.prompts)
    table = to_markdown(rows)
    print(table)
    if options.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python scripts/bench_api.py " + " ".join(arguments or sys.argv[1:]),
            "prompts": options.prompts,
            "tasks": rows,
            **provenance.environment(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(table + "\n")


def measure(prompts: int) -> list[dict[str, Any]]:
    """One row per task: the tokens written, and for both ways the requests and tokens read.

    Raises:
        UserError: the pocket models are not there, or the two ways write different texts.
    """
    from proxytune.config.specs import model_specs
    from proxytune.loading.prompting import encode, render
    from proxytune.server.local import with_local_bases

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        choice = ["experiment=pocket", "triple=pocket_api", f"task={TASKS}", "output_dir=unused"]
        cfg = compose("config", choice)
    OmegaConf.resolve(cfg)
    specs = with_local_bases(model_specs(cfg))
    rows = []
    for name, node in cfg.task.items():
        task: Any = instantiate(node, _convert_="all")
        examples = task.examples()[:prompts]
        decoding = asdict(replace(task.decoding, n=min(2, task.decoding.n)))
        row: dict[str, Any] = {"task": str(name)}
        texts = []
        for way, blocks in (("single", False), ("blocks", True)):
            # No cache file: each way must ask for all of its answers.
            assert specs["base"].api is not None
            api = replace(specs["base"].api, blocks=blocks, cache=None)
            base = replace(specs["base"], api=api)
            generator = proxytune.load(base, specs["expert"], specs["antiexpert"])
            encoded = [
                {
                    role: encode(render(example.prompt, specs[role].format, tokenizer), tokenizer)
                    for role, tokenizer in _tokenizers(generator).items()
                }
                for example in examples
            ]
            remote: Any = generator.members["base"].member
            before = remote.client.spent
            got = generator.generate(encoded, **decoding, sample_keys=[e.id for e in examples])
            texts.append([each.token_ids for each in got])
            row["tokens"] = sum(each.extra["api"]["steps"] for each in got)
            row[f"{way}_requests"] = remote.client.spent.requests - before.requests
            row[f"{way}_read"] = remote.client.spent.tokens - before.tokens
        if texts[0] != texts[1]:
            raise UserError(f"{name}: blocks wrote another text than single tokens")
        rows.append(row)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "task"}
    return [*rows, {"task": "all", **total}]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        "| task | tokens written | requests, one token each | requests, blocks | fewer requests "
        "| fewer tokens read |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        single, blocks = row["single_requests"], row["blocks_requests"]
        read = row["single_read"] / row["blocks_read"]
        lines.append(
            f"| {row['task']} | {row['tokens']:,} | {single:,.0f} | {blocks:,.0f} | "
            f"{single / blocks:.1f}x | {read:.1f}x |"
        )
    return "\n".join(lines)


def _tokenizers(generator: Any) -> dict[str, Any]:
    return {role: generator.members[role].tokenizer for role in generator.roles}


if __name__ == "__main__":
    guarded(main, again="")
