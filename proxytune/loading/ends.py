"""Which tokens end a model's text, and which of them the base lacks."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from proxytune.errors import UserError
from proxytune.proxy import SharedEnd


def end_ids(tokenizer: Any | None, *configs: Any) -> frozenset[int]:
    """Every token that ends a completion, by a tokenizer and configurations.

    Args:
        tokenizer: None where there is none.
        configs: a model's configuration and its generation configuration; None for none.
    """
    found = [getattr(source, "eos_token_id", None) for source in (tokenizer, *configs)]
    lists = [each if isinstance(each, list | tuple) else [each] for each in found]
    # -1 stands for none in some configurations
    return frozenset(int(i) for each in lists for i in each if i is not None and int(i) >= 0)


def shared_end(
    ends: Mapping[str, Collection[int]],
    sizes: Mapping[str, int],
    tokenizer: Any | None,
    vocab_size: int,
    foreign: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> SharedEnd | None:
    """The token that takes the place of end tokens that the base lacks.

    It is the base's; a base whose own end tokens all lie beyond takes another member's.

    Args:
        ends: role -> the tokens that end that model's text.
        sizes: role -> entries of the model's logits; a base behind an API is missing.
        tokenizer: the base's; None where it is unknown.
        vocab_size: of the shared vocabulary.
        foreign: role -> ids below it that are other tokens to the base.

    Returns:
        None if there are no such tokens.

    Raises:
        UserError: there are, and no member has an end token in the shared vocabulary.
    """

    def lacked(role: str, token: int) -> bool:
        beyond = vocab_size <= token < sizes.get(role, vocab_size)
        return beyond or token in foreign.get(role, ())

    beyond = {role: [t for t in sorted(ends[role]) if lacked(role, t)] for role in ends}
    if not any(beyond.values()):
        return None
    first = getattr(tokenizer, "eos_token_id", None)
    known = [(role, token) for role in ("base", *ends) for token in sorted(ends[role])]
    known = [token for role, token in known if token < vocab_size and not lacked(role, token)]
    known = [first, *known] if first is not None and first < vocab_size else known
    if not known:
        role, tokens = next((role, tokens) for role, tokens in beyond.items() if tokens)
        raise UserError(
            f"the {role} ends its text with token {tokens[0]}, which not all models have, and no "
            "shared token ends a text; give the base's tokenizer an eos_token"
        )
    token = known[0]
    of_all = {role: token in ends[role] and not lacked(role, token) for role in beyond}
    own = {role: [token] if shared else [] for role, shared in of_all.items()}
    of = {role: (*own[role], *tokens) for role, tokens in beyond.items() if tokens}
    return SharedEnd(token, of, vocab_size)


def in_words(end: SharedEnd, tokenizers: Mapping[str, Any]) -> str:
    """One line about a `SharedEnd`.

    Args:
        end: what was found.
        tokenizers: role -> tokenizer; None where it is unknown.
    """

    def named(role: str, token: int) -> str:
        tokenizer = tokenizers.get(role)
        text = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        return f"{text} ({token})" if text else f"token {token}"

    theirs = [
        f"the {role} ends its text with {named(role, token)}"
        for role, tokens in end.of.items()
        for token in tokens
        if token != end.token
    ]
    return (
        f"{', '.join(theirs)}, which the base lacks: it counts as the end token "
        f"{named('base', end.token)} of the base"
    )
