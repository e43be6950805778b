"""Whether models share a vocabulary, token by token; and what is done where they do not.

strict   every shared id is the same token to all members
special  added tokens (`<|im_end|>`) may have other names: such an id gets no shift
map      members of other vocabularies speak the base's ids (`translation`)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from proxytune.errors import UserError
from proxytune.loading.ends import shared_end
from proxytune.loading.prompting import PromptFormat, thinking
from proxytune.loading.translation import Tokens, counterparts, make_translation
from proxytune.members.translated import Translation
from proxytune.proxy import SharedEnd
from proxytune.roles import pair_of

STRICT, SPECIAL, MAP = KINDS = ("strict", "special", "map")
_SHOWN = 8  # renamed tokens that the line of a run names


@dataclass(frozen=True)
class Vocabulary:
    """What members have in common, and what follows from it for their logits.

    Attributes:
        kind: one of `KINDS`.
        size: of the shared vocabulary; logits are cut to it.
        end: see `SharedEnd`; None where no end token needs it.
        renamed: id -> role -> its name there, of the ids that have several names.
        unshifted: role -> the ids of the shared vocabulary that get no shift from its pair; also
            where there are none, but the base lacks tokens of the role.
        translations: role -> its translation, where it has another vocabulary.
    """

    kind: str
    size: int
    end: SharedEnd | None = None
    renamed: Mapping[int, Mapping[str, str | None]] = field(default_factory=dict)
    unshifted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    translations: Mapping[str, Translation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any] | None:
        """For JSON; None where every id is one token to all members."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.renamed:
            without = {token for ids in self.unshifted.values() for token in ids}
            found["renamed"] = [
                {"id": token, **names, "shifted": token not in without}
                for token, names in self.renamed.items()
            ]
        if self.translations:
            found["translated"] = {r: counterparts(each) for r, each in self.translations.items()}
        return found if len(found) > 1 else None

    def in_words(self) -> str | None:
        """One line about what the members do not share; None where that is nothing."""
        if self.translations:
            known = {role: counterparts(each) for role, each in self.translations.items()}
            shares = [
                f"the {role} has {each['ids']:,} of the base's {self.size:,} tokens "
                f"({each['share']:.1%})"
                for role, each in known.items()
            ]
            return f"vocabulary=map: {', '.join(shares)}; the others get no shift"
        if not self.renamed:
            return None
        without = {token for ids in self.unshifted.values() for token in ids}
        shown = [
            f"{token} ({' / '.join(dict.fromkeys(str(name) for name in names.values()))})"
            + ("" if token in without else " has one meaning to all and is shifted")
            for token, names in list(self.renamed.items())[:_SHOWN]
        ]
        more = len(self.renamed) - len(shown)
        rest = f" and {more} more" if more > 0 else ""
        return (
            f"vocabulary={self.kind}: tokens with several names get no shift: "
            f"{', '.join(shown)}{rest}"
        )


def settle_vocabulary(
    kind: str,
    tokenizers: Mapping[str, Any],
    sizes: Mapping[str, int],
    ends: Mapping[str, Collection[int]],
    formats: Mapping[str, PromptFormat] = MappingProxyType({}),
) -> Vocabulary:
    """The vocabulary of a base and its helpers.

    Args:
        kind: one of `KINDS`.
        tokenizers: role -> tokenizer; None where it is unknown.
        sizes: role -> entries of the model's logits; a base behind an API is missing.
        ends: role -> the tokens that end that model's text.
        formats: role -> its format, for the tags of thoughts.

    Raises:
        UserError: see `common_vocabulary` and `shared_end`.
    """
    if kind == MAP and "base" in tokenizers:
        return _mapped(tokenizers, sizes, ends)
    size = common_vocabulary(tokenizers, sizes, kind)
    names = _names(tokenizers, size) if kind == SPECIAL else {}
    renamed = {
        token: {role: words[token] for role, words in names.items()} for token in _differing(names)
    }
    foreign = {
        role: {token for token, each in renamed.items() if each[role] != each["base"]}
        - (set(ends["base"]) & set(ends[role]))
        for role in names
        if "base" in names
    }
    end = shared_end(ends, sizes, tokenizers.get("base"), size, foreign)
    # A thought's tags mean to the whole system what they mean to the member that thinks. Without a
    # shift the base, to which the end tag is a token that it never writes, would end no thought.
    tags = _tags(tokenizers, formats) if kind == SPECIAL else set()
    foreign = {role: ids - tags for role, ids in foreign.items()}
    return Vocabulary(kind, size, end, renamed, _unshifted(ends, foreign, end))


def _tags(tokenizers: Mapping[str, Any], formats: Mapping[str, PromptFormat]) -> set[int]:
    """The ids of the tags of thoughts that are one token to the member that thinks."""
    found = set()
    for role in thinking(formats):
        for tag in formats[role].tags if tokenizers[role] is not None else ():
            ids = tokenizers[role](tag, add_special_tokens=False)["input_ids"]
            found |= set(ids) if len(ids) == 1 else set()
    return found


def _mapped(
    tokenizers: Mapping[str, Any],
    sizes: Mapping[str, int],
    ends: Mapping[str, Collection[int]],
) -> Vocabulary:
    """`settle_vocabulary` where helpers may have other vocabularies."""
    translated = _other_vocabularies(tokenizers, sizes)
    alike = {role: each for role, each in tokenizers.items() if role not in translated}
    widths = {role: size for role, size in sizes.items() if role in alike}
    size = common_vocabulary(alike, widths)
    own_ends = {role: each for role, each in ends.items() if role in alike}
    end = shared_end(own_ends, widths, tokenizers["base"], size)
    token = end.token if end else _end_token(tokenizers["base"], ends["base"], size)
    base = Tokens(tokenizers["base"], size, ends["base"])
    found = {
        role: make_translation(base, _tokens_of(role, tokenizers, sizes, ends[role]), token)
        for role in translated
    }
    without: dict[str, set[int]] = {}
    for role, each in found.items():
        if each.lossy:
            without.setdefault(pair_of(role), set()).update(each.missing)
    unshifted = {
        role: tuple(sorted(without[pair_of(role)]))
        for role in tokenizers
        if role != "base" and pair_of(role) in without
    }
    return Vocabulary(MAP, size, end, {}, unshifted, found)


def _other_vocabularies(tokenizers: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """The roles whose vocabulary is not the base's.

    Raises:
        UserError: a tokenizer is unknown, or none of a role's tokens writes what one of the base's
            does.
    """
    found = []
    for role, tokenizer in tokenizers.items():
        if tokenizer is None:
            raise UserError(
                f"vocabulary=map needs the tokenizer of every model, and the {role} has none"
            )
        both = {"base": tokenizers["base"], role: tokenizer}
        try:
            common_vocabulary(both, {r: size for r, size in sizes.items() if r in both})
        except UserError:
            base, own = (_tokens_of(each, tokenizers, sizes) for each in ("base", role))
            if base.by_bytes.keys().isdisjoint(own.by_bytes):
                raise UserError(
                    f"vocabulary=map: no token of the {role} writes the bytes of one of the base's "
                    f"({type(tokenizer).__name__}, {type(tokenizers['base']).__name__})"
                ) from None
            found.append(role)
    return found


def _tokens_of(
    role: str,
    tokenizers: Mapping[str, Any],
    sizes: Mapping[str, int],
    ends: Collection[int] = (),
) -> Tokens:
    """The tokens of one member."""
    length = max(tokenizers[role].get_vocab().values()) + 1
    return Tokens(tokenizers[role], min(length, sizes.get(role, length)), ends)


def _end_token(tokenizer: Any, ends: Collection[int], size: int) -> int | None:
    """The base's end token: the tokenizer's, or the first of its configurations."""
    known = [tokenizer.eos_token_id, *sorted(ends)]
    return next((token for token in known if token is not None and token < size), None)


def _unshifted(
    roles: Collection[str], foreign: Mapping[str, Collection[int]], end: SharedEnd | None
) -> dict[str, tuple[int, ...]]:
    """Role -> the ids that one of its pair has no such token for.

    Args:
        roles: of all members.
        foreign: role -> the ids that are other tokens to it than to the base.
        end: gives the end token its meaning in every role that it names.
    """
    without: dict[str, set[int]] = {}
    for role, ids in foreign.items():
        known = {end.token} if end is not None and role in end.of else set()
        without.setdefault(pair_of(role), set()).update(set(ids) - known)
    helpers = (role for role in roles if role != "base")
    found = {role: tuple(sorted(without.get(pair_of(role), ()))) for role in helpers}
    return {role: ids for role, ids in found.items() if ids}


def common_vocabulary(
    tokenizers: Mapping[str, Any],
    sizes: Mapping[str, int],
    kind: str = STRICT,
    way_out: bool = True,
) -> int:
    """The number of token ids that mean the same to every member.

    Logits are often padded beyond the tokenizer's vocabulary, and a tuned model may have tokens of
    its own after the shared ones (CodeLlama's infilling tokens after Llama-2's 32,000). Both are
    cut.

    Args:
        tokenizers: role -> tokenizer; None where it is unknown.
        sizes: role -> entries of the model's logits; a role may be missing.
        kind: "special" lets added tokens differ; "map" lets the vocabulary of any role but the base
            be another one, which is left out then.
        way_out: whether the message names the other kinds.

    Raises:
        UserError: a token id below that number is another token to two members, or the cut would
            take ordinary tokens from the base (or from the first role, where there is no base).
    """
    check_kind(kind)
    if kind == MAP and "base" in tokenizers:
        others = _other_vocabularies(tokenizers, sizes)
        tokenizers = {role: each for role, each in tokenizers.items() if role not in others}
        sizes = {role: size for role, size in sizes.items() if role not in others}
    known = {role: tokenizer for role, tokenizer in tokenizers.items() if tokenizer is not None}
    lengths = {role: max(each.get_vocab().values()) + 1 for role, each in known.items()}
    common = min([*lengths.values(), *sizes.values()])
    if not known:
        return common
    names = _names(known, common)
    first_role = next(iter(names))
    differing = _differing(names)
    ordinary = [token for token in differing if not _is_added(token, names, known)]
    if differing and (ordinary or kind != SPECIAL):
        _refuse_token(min(ordinary or differing), names, special=not ordinary, way_out=way_out)
    added = {token.content for token in known[first_role].added_tokens_decoder.values()}
    table = known[first_role].get_vocab()
    beyond = {i: w for w, i in table.items() if i >= common and w not in added}
    if beyond:
        lost = min(beyond)
        ends = {role: min(lengths[role], sizes.get(role, lengths[role])) for role in known}
        short = min(ends, key=lambda role: ends[role])
        raise UserError(
            f"the vocabularies differ: the {first_role} has the token {beyond[lost]!r} "
            f"(id {lost}), but the {short} ends at id {common - 1}; "
            f"{_one_tokenizer(way_out)}"
        )
    return common


def check_kind(kind: str) -> None:
    """Refuses a kind of vocabulary that there is not.

    Raises:
        UserError: it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise UserError(f"vocabulary={kind!r} is none of {', '.join(KINDS)}")


def check_thinks(kind: str, thinks: Sequence[str]) -> None:
    """Refuses a helper that thinks in another vocabulary: its tags are tokens of its own.

    Args:
        kind: one of `KINDS`.
        thinks: the roles whose models think.

    Raises:
        UserError: a helper is among them, and its tokens are translated.
    """
    helper = next((role for role in thinks if role != "base"), None)
    if kind == MAP and helper is not None:
        raise UserError(
            f"{helper}: format.think_end does not go with vocabulary=map, which translates each of "
            "its tokens; use a helper of the base's family"
        )


def _refuse_token(
    token: int, names: Mapping[str, list[str | None]], *, special: bool, way_out: bool
) -> None:
    """Raises the error about a token that is another one to two members.

    Args:
        token: its id.
        names: role -> the token of each id; the first role is compared with the others.
        special: whether added tokens alone differ.
        way_out: see `common_vocabulary`.
    """
    (first, mine), *others = names.items()
    role, theirs = next(each for each in others if each[1][token] != mine[token])
    hint = _one_tokenizer(way_out)
    if special and way_out:
        hint = "special tokens alone differ: vocabulary=special gives them no shift"
    raise UserError(
        f"the vocabularies differ: token {token} is {mine[token]!r} to the {first} and "
        f"{theirs[token]!r} to the {role}; {hint}"
    )


def _one_tokenizer(way_out: bool) -> str:
    needs = "proxy-tuning needs models of one tokenizer"
    return f"{needs}, or vocabulary=map" if way_out else needs


def _is_added(
    token: int, names: Mapping[str, list[str | None]], tokenizers: Mapping[str, Any]
) -> bool:
    """Whether an id is an added token, or none, to every member."""
    return all(
        names[role][token] is None or token in tokenizer.added_tokens_decoder
        for role, tokenizer in tokenizers.items()
    )


def _differing(names: Mapping[str, list[str | None]]) -> list[int]:
    """The ids that are another token to two roles."""
    if len({tuple(words) for words in names.values()}) < 2:
        return []
    return [i for i, each in enumerate(zip(*names.values(), strict=True)) if len(set(each)) > 1]


def _names(tokenizers: Mapping[str, Any], length: int) -> dict[str, list[str | None]]:
    """Role -> the token of each id below `length`; the base first, unknown tokenizers left out."""
    known = [role for role in tokenizers if tokenizers[role] is not None]
    order = sorted(known, key=lambda role: role != "base")
    return {role: _by_id(tokenizers[role].get_vocab(), length) for role in order}


def _by_id(table: Mapping[str, int], length: int) -> list[str | None]:
    """The token of each id below `length`; None for an id without one."""
    words: list[str | None] = [None] * length
    for word, token_id in table.items():
        if token_id < length:
            words[token_id] = word
    return words
