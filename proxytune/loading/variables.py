"""Variables of a chat template's own, such as `enable_thinking`."""

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

from proxytune.errors import UserError

_TAGS = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)  # what a Jinja template computes
_LITERALS = re.compile(r"'[^']*'|\"[^\"]*\"")


def read_by(template: str | None, tokenizer: Any) -> set[str]:
    """The names that a template reads, and other words of its code.

    Args:
        template: its text; None takes the tokenizer's own.
        tokenizer: the member's.
    """
    code = "".join(_TAGS.findall(template or tokenizer.get_chat_template()))
    return set(re.findall(r"\w+", _LITERALS.sub("", code)))


def is_ours(name: str, tokenizer: Any) -> bool:
    """Whether a variable is one that rendering itself sets (add_generation_prompt, tools, ...)."""
    return name in signature(tokenizer.apply_chat_template).parameters


def check_variables(variables: Mapping[str, Any], template: str | None, tokenizer: Any) -> None:
    """Refuses variables that a template does not read: it would ignore them without a word.

    Raises:
        UserError: one of them is not in the template's text, or is one that we set.
    """
    if not variables:
        return
    read = read_by(template, tokenizer)
    for name in variables:
        if is_ours(name, tokenizer):
            raise UserError(f"format.template_kwargs.{name} is no variable of a template's own")
        if name not in read:
            raise UserError(
                f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} "
                f"does not read format.template_kwargs.{name}"
            )
