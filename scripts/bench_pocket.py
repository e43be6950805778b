"""How often the triple chooses the expert's guess, on the pocket models, which are trained."""

from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import proxytune
from proxytune.config.schema import register
from proxytune.engine.loop import DecodeLoop
from proxytune.files import ROOT
from proxytune.loading.prompting import PromptFormat, encode, render

PROMPTS = 24  # per task


def acceptance() -> dict[str, float]:
    """Task of the pocket experiment -> share of single drafted tokens that the triple confirmed.

    Raises:
        UserError: the pocket models are not there.
    """
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["experiment=pocket"])
    OmegaConf.resolve(cfg)
    specs = {role: _spec(cfg.triple[role]) for role in ("base", "expert", "antiexpert")}
    generator = proxytune.load(**specs)  # pyright: ignore[reportArgumentType]
    found = {}
    for name, node in cfg.task.items():
        task: Any = instantiate(node, _convert_="all")
        prompts = [
            {
                role: encode(render(example.prompt, specs[role].format, each), each)
                for role, each in _tokenizers(generator).items()
            }
            for example in task.examples()[:PROMPTS]
        ]
        loop = generator.loop(batch_size=8, speculative=1)
        assert isinstance(loop, DecodeLoop) and loop.pace is not None
        before = loop.pace.accepted, loop.pace.drafted
        for _ in loop.run(generator.requests(prompts, replace(task.decoding, n=1))):
            pass
        drafted = loop.pace.drafted - before[1]
        if drafted:  # a task whose completions are one token long drafts nothing
            found[str(name)] = (loop.pace.accepted - before[0]) / drafted
    return found


def _spec(member: Any) -> proxytune.ModelSpec:
    form = OmegaConf.to_container(member.format)
    return proxytune.ModelSpec(
        member.id,
        dtype=member.dtype,
        device="cpu",
        format=PromptFormat(**form),  # pyright: ignore[reportCallIssue]
    )


def _tokenizers(generator: proxytune.Generator) -> dict[str, Any]:
    return {role: generator.members[role].tokenizer for role in generator.roles}
