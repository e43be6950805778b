"""One example -> the text and the token ids that each member of a triple reads.

A member reads the raw prompt, or the same parts through a chat template. A setting of the member
decides that (`PromptFormat`), never its name.
"""

import logging
import operator
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from proxytune.engine.text import encoded
from proxytune.errors import UserError
from proxytune.loading.length import exceeds
from proxytune.loading.variables import check_variables
from proxytune.records import Prompt

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
Message = Mapping[str, str]
PromptLike = str | Sequence[int] | Sequence[Message]


@dataclass  # not frozen: Hydra builds its schema from it
class PromptFormat:
    """How one model's prompts are rendered.

    Attributes:
        kind: "raw" (the text unchanged) or "chat" (through a chat template).
        chat_template: None takes the tokenizer's own; otherwise the name of a template in
            proxytune/loading/templates ("llama2") or the path of a Jinja file.
        use_system: False drops system turns, for templates that do not accept them.
        template_kwargs: variables of the template's own ({"enable_thinking": False}).
        think_end: the tag that ends the thoughts of a model that thinks ("</think>"); None for one
            that does not. A task's response prefix then comes after the thought.
        think_start: the tag that begins them; None takes `think_end` without its slash.
    """

    kind: str = "raw"
    chat_template: str | None = None
    use_system: bool = True
    template_kwargs: dict[str, Any] | None = field(default_factory=dict)
    think_end: str | None = None
    think_start: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "chat"):
            raise UserError(f"prompt format kind={self.kind!r} is neither raw nor chat")
        self.template_kwargs = self.template_kwargs or {}
        if self.template_kwargs and self.kind == "raw":
            raise UserError("format.template_kwargs needs a chat template: give format.kind=chat")
        if self.kind == "chat" and self.chat_template is not None:
            read_template(self.chat_template)
        self._check_tags()

    def _check_tags(self) -> None:
        if self.think_end is None:
            if self.think_start is not None:
                raise UserError("format.think_start needs format.think_end, the tag that ends it")
            return
        if not self.think_end.strip():
            raise UserError(f"format.think_end is a tag (</think>), not {self.think_end!r}")
        start = self.tags[0]
        if not start.strip() or start == self.think_end:
            raise UserError(
                f"format.think_end={self.think_end!r}: give format.think_start, the tag that "
                "begins a thought"
            )

    @property
    def tags(self) -> tuple[str, str]:
        """The tags that begin and end a thought, of a format that has them."""
        assert self.think_end is not None
        start = self.think_start
        return self.think_end.replace("/", "", 1) if start is None else start, self.think_end

    def ends_thought(self, text: str) -> bool:
        """Whether the model that reads a prompt will write no thought: the prompt has closed it."""
        return self.think_end is None or text.rstrip().endswith(self.think_end)


class TemplateRefusal(UserError):
    """A chat template does not render a conversation.

    Attributes:
        reason: the template's own words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rendered:
    """A prompt as one model reads it.

    Attributes:
        text: the whole text.
        add_special_tokens: whether the tokenizer adds its special tokens (a BOS); False after a
            chat template, which writes them itself.
    """

    text: str
    add_special_tokens: bool


def render(prompt: Prompt, fmt: PromptFormat, tokenizer: Any) -> Rendered:
    """Renders one example's prompt for one member.

    Args:
        prompt: the prompt's parts.
        fmt: the member's format.
        tokenizer: the member's; not used by raw formats.

    Raises:
        UserError: the format is chat, and there is no template or it refuses the turns.
    """
    if fmt.kind == "raw" or prompt.plain:
        raw = prompt.raw if fmt.think_end is None else _without(prompt.raw, prompt.response_prefix)
        return Rendered(raw, add_special_tokens=True)
    return render_messages(messages_of(prompt), fmt, tokenizer)


def _without(text: str, prefix: str) -> str:
    """A raw prompt without the beginning of the answer that ends it."""
    return text.removesuffix(prefix).rstrip() if prefix and text.endswith(prefix) else text


def messages_of(prompt: Prompt) -> list[Message]:
    """The conversation that a member with a chat format reads for a prompt that is not plain."""
    messages: list[Message] = [{"role": "user", "content": prompt.user}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    if prompt.response_prefix:
        messages.append({"role": "assistant", "content": prompt.response_prefix})
    return messages


def render_messages(messages: Sequence[Message], fmt: PromptFormat, tokenizer: Any) -> Rendered:
    """Renders a conversation. If the last turn is the assistant's, the model continues it.

    Args:
        messages: {"role", "content"} turns.
        fmt: the member's format; a raw one reads the contents with blank lines between them.
        tokenizer: the member's; not used by raw formats.

    Raises:
        UserError: there are no messages, no turn of the user comes before the assistant's, or
            the format is chat and there is no template, or the template refuses the turns.
    """
    if not messages:
        raise UserError("a conversation needs at least one message")
    if fmt.kind == "raw":
        return Rendered("\n\n".join(m["content"] for m in messages), add_special_tokens=True)
    turns = [dict(m) for m in messages if fmt.use_system or m["role"] != "system"]
    prefix = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    if not turns:
        raise UserError("a conversation needs a turn of the user before the assistant's")
    template = template_of(fmt, tokenizer)
    variables = fmt.template_kwargs or {}
    check_variables(variables, template, tokenizer)
    text = apply_template(turns, tokenizer, template, variables=variables)
    if prefix and fmt.think_end and not fmt.ends_thought(text) and fmt.think_end not in prefix:
        return Rendered(text, add_special_tokens=False)  # the thought comes first, then the prefix
    if prefix and not text[-1:].isspace():
        text += " "
    return Rendered(text + prefix, add_special_tokens=False)


def apply_template(
    turns: Sequence[Message],
    tokenizer: Any,
    template: str | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Renders turns through a chat template.

    Args:
        turns: {"role", "content"} each.
        tokenizer: gives the template its special tokens.
        template: None takes the tokenizer's own.
        add_generation_prompt: whether the text ends where the assistant's turn begins.
        variables: of the template's own.

    Raises:
        UserError: the template refuses them; the message repeats its reason.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    # A template is foreign code: it refuses by TemplateError, and may fail by any of the others.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        roles = ", ".join(turn["role"] for turn in turns)
        raise TemplateRefusal(
            f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} "
            f"cannot render the turns {roles}: {reason}; drop system turns (format.use_system="
            "false), give another template (format.chat_template=...), or format.kind=raw",
            reason,
        ) from error


def encode(rendered: Rendered, tokenizer: Any, most: int | None = None) -> list[int]:
    """The token ids of a rendered prompt; see `prompt_ids`."""
    return prompt_ids(rendered.text, tokenizer, rendered.add_special_tokens, most)


def prompt_ids(
    text: str, tokenizer: Any, special: bool = True, most: int | None = None
) -> list[int]:
    """The token ids of a text that a model is to continue.

    Tokens that the tokenizer adds after a text are cut (`engine.text.encoded`).

    Args:
        text: what the model reads.
        tokenizer: the model's.
        special: whether the tokenizer adds its special tokens; only its first ones stay.
        most: the longest prompt in tokens that the model reads; None for no limit.

    Raises:
        UserError: the text is so long that its beginning alone has more tokens than `most`. A
            text that is a little too long is encoded.
    """
    if most is not None and exceeds(text, tokenizer, most):
        raise UserError(
            f"the prompt has {len(text):,} characters, more tokens than fit; the models read at "
            f"most {most}"
        )
    return encoded(text, tokenizer, special)


def token_ids(
    prompt: PromptLike, fmt: PromptFormat, tokenizer: Any | None, most: int | None = None
) -> list[int]:
    """The token ids of a prompt, as one member reads it.

    Args:
        prompt: a text, token ids, or chat messages.
        fmt: the member's format; it applies to chat messages alone.
        tokenizer: the member's; None is enough for token ids.
        most: as for `prompt_ids`.

    Raises:
        UserError: the prompt is none of these, or it needs a tokenizer and there is none, or it
            is much too long.
    """
    messages = as_messages(prompt)
    if messages is None and not isinstance(prompt, str):
        return _as_ids(prompt)
    if tokenizer is None:
        raise UserError(
            "this needs a tokenizer: give load(..., tokenizer=...), or token ids as prompts"
        )
    if messages is not None:
        return encode(render_messages(messages, fmt, tokenizer), tokenizer, most)
    assert isinstance(prompt, str)
    return prompt_ids(prompt, tokenizer, most=most)


def begun_answer(prompt: Any) -> str:
    """The text with which a conversation lets the answer begin; "" for every other prompt."""
    messages = as_messages(prompt)
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""


def thinking(formats: Mapping[str, PromptFormat]) -> list[str]:
    """The roles of a system whose models think.

    Raises:
        UserError: they have different tags, and a text has one thought.
    """
    roles = [role for role, fmt in formats.items() if fmt.think_end is not None]
    odd = next((r for r in roles if formats[r].tags != formats[roles[0]].tags), None)
    if odd is not None:
        raise UserError(
            f"{roles[0]} and {odd} end their thoughts with {formats[roles[0]].think_end!r} and "
            f"{formats[odd].think_end!r}: all members write one text, so give one think_end"
        )
    return roles


def as_messages(prompt: Any) -> Sequence[Message] | None:
    """The prompt itself if it is a conversation, else None.

    Raises:
        UserError: a turn lacks its role or its content.
    """
    conversation = isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping)
    if not conversation:
        return None
    for message in prompt:
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise UserError(f"a chat message has a role and a content, not {message!r}")
    return prompt


def _as_ids(prompt: Any) -> list[int]:
    """Token ids from a tensor, an array or a list.

    Raises:
        UserError: it is no sequence of integers.
    """
    try:
        tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)  # tensors, arrays
        if any(isinstance(token, bool) for token in tokens):  # True == 1, but it is no token id
            raise TypeError("truth values")
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise UserError(
            "a prompt is a string, token ids, chat messages, or role -> token ids; not "
            f"{reprlib.repr(prompt)}"
        ) from error


@cache
def read_template(name: str) -> str:
    """The text of a shipped template (by name) or of a Jinja file (by path).

    Raises:
        UserError: it is neither.
    """
    shipped = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"chat_template={name!r} is neither a file nor one of the shipped templates "
            f"({', '.join(sorted(shipped))}); leave it null for the tokenizer's own"
        )
    return path.read_text(encoding="utf-8")


def template_of(fmt: PromptFormat, tokenizer: Any) -> str | None:
    """The chat template's text; None for the tokenizer's own.

    Raises:
        UserError: there is no template.
    """
    if fmt.chat_template is not None:
        return read_template(fmt.chat_template)
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')} has no chat template of its "
            "own: set format.chat_template to a shipped name (llama2) or a Jinja file, or "
            "format.kind=raw"
        )
    return None
