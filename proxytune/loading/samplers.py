"""From settings to what chooses tokens, and to how completions think: strings become token ids."""

from collections.abc import Mapping, Sequence
from functools import cached_property

from proxytune.engine.sampling import Sampler, token_texts, tokens_of
from proxytune.engine.thought import AFTER, BEFORE, FIRST, INSIDE, Thought, thought_of
from proxytune.errors import UserError
from proxytune.loading.loaded import LoadedModel
from proxytune.records import Decoding

_TAIL = 32  # last tokens of a prompt, among which the tag that opens a thought would be


class Samplers:
    """Makes the samplers of one system.

    Args:
        base: the system's base, whose tokens are chosen.
        vocab_size: how many of them.
        kind: what chooses tokens.
    """

    def __init__(self, base: LoadedModel, vocab_size: int, kind: type[Sampler] = Sampler) -> None:
        self._base = base
        self._vocab_size = vocab_size
        self._kind = kind

    def of(self, decoding: Decoding) -> Sampler:
        """The sampler of these settings.

        Raises:
            UserError: no single token writes any of the choices.
        """
        if not _lists(decoding):
            return self._kind(decoding)
        banned, first, choices = self._ids(decoding)
        if decoding.choices and not choices - banned:
            raise UserError(f"no single token writes any of choices={list(decoding.choices)}")
        return self._kind(decoding, sorted(banned), sorted(first), sorted(choices))

    def by_phase(self, decoding: Decoding, thinker: LoadedModel) -> dict[str, Sampler]:
        """What chooses tokens before, in and right after a thought: lists are about the answer.

        Args:
            decoding: the settings.
            thinker: a model that thinks.
        """
        if not _lists(decoding):
            return {}
        tokenizer, tag = thinker.need_tokenizer(), thinker.format.tags[0]
        opening: list[int] = tokenizer(tag, add_special_tokens=False)["input_ids"]
        banned, first, choices = self._ids(decoding)
        after = self._kind(decoding, sorted(banned | first), (), sorted(choices))
        # Of a tag of several tokens, the first one alone would be no answer.
        before = sorted(choices | set(opening if len(opening) == 1 else [])) if choices else []
        untagged = sorted(banned - {*opening}), sorted(first - {*opening})
        return {
            BEFORE: self._kind(decoding, *untagged, before),
            INSIDE: self._kind(decoding),
            AFTER: after,
            FIRST: after,
        }

    def _ids(self, decoding: Decoding) -> tuple[set[int], set[int], set[int]]:
        """The tokens that are banned, banned as the first one, and the only ones chosen."""
        lists = (decoding.banned, decoding.banned_first, decoding.choices)
        banned, first, choices = (tokens_of(strings, self._texts) for strings in lists)
        return banned, first, choices

    @cached_property
    def _texts(self) -> list[str]:
        return token_texts(self._base.need_tokenizer(), self._vocab_size)


def _lists(decoding: Decoding) -> bool:
    return bool(decoding.banned or decoding.banned_first or decoding.choices)


def thought_for(
    members: Mapping[str, LoadedModel],
    thinks: Sequence[str],
    ids: Mapping[str, Sequence[int]],
    prefix: str,
    decoding: Decoding,
) -> Thought:
    """How the completions of a prompt think.

    Args:
        members: role -> loaded model.
        thinks: the roles whose models think; at least one.
        ids: the prompt, role -> token ids.
        prefix: text that begins the answer after a thought.
        decoding: the settings.

    Raises:
        UserError: see `thought_of`.
    """
    start, end = members[thinks[0]].format.tags
    ends = [
        members[role].need_tokenizer().decode(ids[role][-_TAIL:], skip_special_tokens=False)
        for role in thinks
    ]
    return thought_of(
        start,
        end,
        members[thinks[0]].need_tokenizer(),
        opened=any(text.rstrip().endswith(start) for text in ends),
        prefix=prefix,
        word=None if decoding.think_least is None else decoding.think_word,
    )
