"""A prompt as each member of a system reads it: role -> token ids."""

from collections.abc import Mapping, Sequence

from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.prompting import PromptFormat, PromptLike, as_messages, token_ids
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

    def encode(
        self, prompt: PromptLike | Mapping[str, Sequence[int]], most: int | None
    ) -> dict[str, list[int]]:
        """A prompt as each member reads it: role -> token ids.

        Args:
            prompt: a text, the base's token ids, chat messages, or role -> that member's own ids.
            most: the longest prompt in tokens that the members read; None for no limit.

        Raises:
            UserError: the prompt is empty, has unknown token ids, lacks a role, or is a text so
                long that no model can read it.
        """
        if isinstance(prompt, Mapping):
            if not prompt.keys() >= set(self._roles):
                raise UserError(f"the prompt has roles {sorted(prompt)}, not {self._roles}")
            given = {role: prompt[role] for role in self._roles}
        else:
            given = dict.fromkeys(self._members, prompt)
            if self._translations and not isinstance(prompt, str) and as_messages(prompt) is None:
                given |= self._translated(token_ids(prompt, PromptFormat(), None))
        ids = {
            role: token_ids(each, self._members[role].format, self._members[role].tokenizer, most)
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
