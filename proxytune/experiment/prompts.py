"""Renders every prompt that a run will ask, before a model is loaded: templates refuse some."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxytune.errors import UserError
from proxytune.experiment.cells import Cell, TaskCell
from proxytune.experiment.completions import render_prompts
from proxytune.loading.prompting import (
    Message,
    PromptFormat,
    Rendered,
    TemplateRefusal,
    render_messages,
)

if TYPE_CHECKING:  # it imports transformers' models, and most refusals come before those
    from proxytune.loading.spec import ModelSpec

log = logging.getLogger(__name__)


def check_prompts(cells: Sequence[Cell], specs: Mapping[str, "ModelSpec"]) -> None:
    """Renders the conversations that the cells still ask, for every member that reads them.

    Args:
        cells: of all systems and tasks.
        specs: role of the triple -> model.

    Raises:
        UserError: a member's chat template refuses a conversation; task, member, the template's
            reason and the way out.
    """
    from proxytune.loading.load import load_tokenizer

    tokenizers: dict[str, Any] = {}
    done: set[tuple[str, str]] = set()
    for cell in cells:
        for name in cell.members.values():
            known = specs[name].format.kind == "raw" or (cell.task_name, name) in done
            if known or not cell.missing():
                continue
            done.add((cell.task_name, name))
            if name not in tokenizers:
                tokenizers[name] = load_tokenizer(specs[name], name)
            place = f"task {cell.task_name}: {name} ({specs[name].id})"
            _render_all(place, name, cell.conversations(), specs[name].format, tokenizers[name])


def check_one_prompt(cells: Sequence[Cell], specs: Mapping[str, "ModelSpec"]) -> None:
    """Refuses prompts that differ from member to member where vLLM gives all members one.

    Args:
        cells: of all systems and tasks; a triple's alone have several members.
        specs: role of the triple -> model.

    Raises:
        UserError: the first such prompt; see `vllm.checks.check_one_prompt`.
    """
    from proxytune.vllm import checks
    from proxytune.vllm.plan import make_plan

    triples = [cell for cell in cells if len(cell.members) > 1]
    if checks.uses_v2() or not triples:
        return
    members = make_plan({role: specs[n] for role, n in triples[0].members.items()}).models
    several = any(member.format != members["base"].format for member in members.values())
    for cell in triples:
        place = f"task {cell.task_name}"
        if isinstance(cell, TaskCell):
            rendered = render_prompts(cell.missing(), members)
            checks.check_one_prompt((each.token_ids for each in rendered), place)
        elif several and cell.missing():
            raise UserError(f"{place}: the members have several formats; {checks.V1_READS_ONE}")


def _render_all(
    place: str,
    name: str,
    conversations: Iterable[Sequence[Message]],
    fmt: PromptFormat,
    tokenizer: Any,
) -> None:
    """Renders the conversations of one task for one member.

    Args:
        place: task and member, for messages.
        name: the member's role in the triple.
        conversations: what is asked.
        fmt: the member's format.
        tokenizer: the member's.
    """
    for number, messages in enumerate(conversations):
        try:
            rendered = render_messages(messages, fmt, tokenizer)
        except TemplateRefusal as error:
            way_out = _way_out(name, messages, fmt, tokenizer)
            raise UserError(
                f"{place}: its chat template refuses the prompt: {error.reason}; {way_out}"
            ) from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if number == 0:
            _look_at(place, name, messages, rendered, fmt, tokenizer)


def _way_out(name: str, messages: Sequence[Message], fmt: PromptFormat, tokenizer: Any) -> str:
    """The setting with which a refused conversation can be rendered."""
    setting = f"triple.{name}.format"
    other = f"give another template ({setting}.chat_template=FILE) or {setting}.kind=raw"
    if not any(message["role"] == "system" for message in messages):
        return other
    try:
        render_messages(messages, replace(fmt, use_system=False), tokenizer)
    except UserError:
        return other
    return f"leave system turns out with {setting}.use_system=false, or {other}"


def _look_at(
    place: str,
    name: str,
    messages: Sequence[Message],
    rendered: Rendered,
    fmt: PromptFormat,
    tokenizer: Any,
) -> None:
    """Warns of a template that loses a turn, or ends the text before the answer."""
    for message in messages:
        dropped = message["role"] == "system" and not fmt.use_system
        if fmt.think_end and message is messages[-1] and message["role"] == "assistant":
            dropped = True  # the response prefix, which is written after the thought
        if not dropped and message["content"].strip() not in rendered.text:
            log.warning(
                "%s: its chat template leaves out the %s turn, or changes it; see "
                "triple.%s.format.chat_template",
                place,
                message["role"],
                name,
            )
    end = getattr(tokenizer, "eos_token", None)
    if end and rendered.text.rstrip().endswith(end):
        log.warning(
            "%s: its chat template ends the prompt with the end token %s: a model may begin "
            "another text there; see triple.%s.format.chat_template",
            place,
            end,
            name,
        )
