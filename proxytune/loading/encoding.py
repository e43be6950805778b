"""A prompt as each member of a system reads it: role -> token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import (
    PromptFormat,
    PromptLike,
    as_messages,
    template_of,
    token_ids,
)
from proxytune.loading.variables import is_ours, read_by
from proxytune.members.translated import Translation, own_ids


class Encoder:
    """Encodes prompts for the members of a system, and checks their ids.

    A member of another vocabulary has its prompts in its own ids, each written as -1 - id
    (`members.translated`).

    Args:
        members: role -> loaded model.
        vocab_size: of the shared vocabulary.
        translations: role -> its translation, where it has another vocabulary.
    """

    def __init__(
        self,
        members: Mapping[str, LoadedModel],
        vocab_size: int,
        translations: Mapping[str, Translation],
    ) -> None:
        self._members = members
        self._translations = translations
        self._roles = tuple(role for role in members if role != "draft")
        self._vocab_size = vocab_size
        # A helper's own prompt may hold tokens that only it has (the marks of its chat template).
        self._readable = {
            role: max(vocab_size, 0 if role == "base" else member.output_size or 0)
            for role, member in members.items()
        } | {role: each.own_size for role, each in translations.items()}

    def formats(self, variables: Mapping[str, Any] | None = None) -> dict[str, PromptFormat]:
        """Role -> its format, with variables of a request's own for the chat templates.

        A template gets those that it reads: members of one system have different templates.

        Args:
            variables: name -> value; they win over `PromptFormat.template_kwargs`.

        Raises:
            UserError: no member has a chat format, or no template reads one of the variables.
        """
        formats = {role: member.format for role, member in self._members.items()}
        if not variables:
            return formats
        chats = {role: fmt for role, fmt in formats.items() if fmt.kind == "chat"}
        if not chats:
            raise UserError(
                "variables of a chat template need a member with one, and all read raw text; set "
                "format.kind=chat for a member (in a triple's file: format: {kind: chat})"
            )
        tokenizers = {role: self._members[role].need_tokenizer() for role in chats}
        own = {
            r: read_by(template_of(fmt, tokenizers[r]), tokenizers[r]) for r, fmt in chats.items()
        }
        for name in variables:
            if any(is_ours(name, each) for each in tokenizers.values()):
                raise UserError(f"{name} is no variable of a chat template's own")
            if not any(name in read for read in own.values()):
                raise UserError(f"no member's chat template reads {name}")
        for role, fmt in chats.items():
            mine = {name: value for name, value in variables.items() if name in own[role]}
            formats[role] = replace(fmt, template_kwargs=(fmt.template_kwargs or {}) | mine)
        return formats

    def encode(
        self,
        prompt: PromptLike | Mapping[str, Sequence[int]],
        most: int | None,
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, list[int]]:
        """A prompt as each member reads it: role -> token ids.

        Args:
            prompt: a text, the base's token ids, chat messages, or role -> that member's own ids.
            most: the longest prompt in tokens that the members read; None for no limit.
            variables: see `formats`; of chat messages.

        Raises:
            UserError: see `formats`; or the prompt is empty, has unknown token ids, lacks a role,
                or is a text so long that no model can read it.
        """
        if isinstance(prompt, Mapping):
            if not prompt.keys() >= set(self._roles):
                raise UserError(f"the prompt has roles {sorted(prompt)}, not {self._roles}")
            given = {role: prompt[role] for role in self._roles}
        else:
            given = dict.fromkeys(self._members, prompt)
            if self._translations and not isinstance(prompt, str) and as_messages(prompt) is None:
                given |= self._translated(token_ids(prompt, PromptFormat(), None))
        formats = self.formats(variables)
        ids = {
            role: token_ids(each, formats[role], self._members[role].tokenizer, most)
            for role, each in given.items()
        }
        if "draft" in self._members:
            ids.setdefault("draft", ids["base"])
        for role, tokens in ids.items():
            if not tokens:
                raise UserError(
                    f"the prompt of the {role} has no tokens; give it at least one (a BOS)"
                )
            if role in self._translations:
                own = [-1 - token if token < 0 else token for token in tokens]
                self._check(role, own)
                ids[role] = own_ids(own)
            else:
                self._check(role, tokens)
        return ids

    def _check(self, role: str, ids: Sequence[int]) -> None:
        """Refuses ids that a member does not have."""
        odd = next((token for token in ids if not 0 <= token < self._readable[role]), None)
        if odd is not None:
            raise UserError(
                f"token id {odd} in the prompt of the {role} is outside the common vocabulary of "
                f"{self._readable[role]}"
            )

    def _translated(self, prompt: Sequence[int]) -> dict[str, list[int]]:
        """A prompt of the base's ids, as members of other vocabularies read it."""
        self._check("base", prompt)
        return {
            role: [own for token in prompt for own in translation.read(token)]
            for role, translation in self._translations.items()
        }

    def with_base_ids(self, prompt: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """An encoded prompt, where members of other vocabularies read the base's ids."""
        return {r: prompt["base"] if r in self._translations else ids for r, ids in prompt.items()}

    def grown(self, prompt: Mapping[str, list[int]], more: Sequence[int]) -> dict[str, list[int]]:
        """An encoded prompt with more of the base's ids, in the tokens that each member reads."""

        def own(role: str, ids: Sequence[int]) -> list[int]:
            if role not in self._translations:
                return list(ids)
            read = self._translations[role].read
            return [each for t in ids for each in ((t,) if t < 0 else read(t))]

        return {role: own(role, [*ids, *more]) for role, ids in prompt.items()}
