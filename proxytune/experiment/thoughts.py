"""Refusals about experts that think, before a model is loaded."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from proxytune.config.formulas import members_of
from proxytune.errors import UserError
from proxytune.experiment.planned import decoding_of

log = logging.getLogger(__name__)

_SETTINGS = ("think_budget", "think_least", "think_word")
_SHORTEST = 3  # tokens of a thought's tags and an answer


def check_thoughts(cfg: DictConfig, specs: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Refuses members of a system that end their thoughts otherwise, and thoughts without room.

    Warns of settings of thoughts in a run whose models write none.

    Args:
        cfg: the configuration.
        specs: role of the triple -> model.
        tasks: name -> benchmark.

    Raises:
        UserError: names the member or the setting.
    """
    from proxytune.loading.prompting import thinking
    from proxytune.loading.vocabulary import check_thinks

    thinkers: dict[str, Any] = {}
    for system in cfg.systems:
        members = members_of(cfg, system)
        thinks = thinking({role: specs[name].format for role, name in members.items()})
        check_thinks(cfg.triple.vocabulary, thinks)
        if not thinks:
            continue
        thinkers |= {members[role]: specs[members[role]] for role in thinks}
        for name, task in tasks.items():
            if task.runs_itself:
                continue
            decoding = decoding_of(cfg, task)
            if decoding.max_new_tokens < _SHORTEST:
                raise UserError(
                    f"task {name}: max_new_tokens={decoding.max_new_tokens} leaves "
                    f"no room for a thought of the system {system}; raise decoding.max_new_tokens"
                )
            if decoding.think_least is not None:
                _check_word(specs[members[thinks[0]]], members[thinks[0]], decoding.think_word)
    for name, spec in thinkers.items():
        _check_tag(spec, name)
    given = [key for key in _SETTINGS if cfg.decoding[key] is not None]
    if given and not thinkers:
        log.warning(
            "decoding.%s changes nothing: no model of systems=[%s] thinks; one that does has "
            "format.think_end (docs/models.md)",
            given[0],
            ",".join(cfg.systems),
        )


def _check_tag(spec: Any, name: str) -> None:
    """Warns of an end of thoughts that the model may never write: its thoughts would be scored."""
    from proxytune.loading.load import load_tokenizer
    from proxytune.loading.prompting import template_of

    tokenizer, (_, end) = load_tokenizer(spec, name), spec.format.tags
    known = end in tokenizer.get_vocab()
    if not known and spec.format.kind == "chat":
        known = end in (template_of(spec.format, tokenizer) or tokenizer.get_chat_template())
    if not known:
        log.warning(
            "%s: %r, which ends a thought (format.think_end), is no token of %s, nor in its chat "
            "template; if it is misspelt, thoughts are scored as answers",
            name,
            end,
            spec.id,
        )


def _check_word(spec: Any, name: str, word: str) -> None:
    """Refuses a word that cannot take the place of a thought's end; see `thought_of`."""
    from proxytune.engine.thought import thought_of
    from proxytune.loading.load import load_tokenizer

    start, end = spec.format.tags
    thought_of(start, end, load_tokenizer(spec, name), opened=False, prefix="", word=word)
