"""Whether models share a vocabulary, token by token."""

from collections.abc import Mapping
from typing import Any

from proxytune.errors import UserError


def common_vocabulary(tokenizers: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """The number of token ids that mean the same to every member.

    Logits are often padded beyond the tokenizer's vocabulary, and a tuned model may have tokens of
    its own after the shared ones (CodeLlama's infilling tokens after Llama-2's 32,000). Both are
    cut.

    Args:
        tokenizers: role -> tokenizer; None where it is unknown.
        sizes: role -> entries of the model's logits; a role may be missing.

    Raises:
        UserError: a token id below that number is another token to two members, or the cut would
            take ordinary tokens from the base (or from the first role, where there is no base).
    """
    known = {role: tokenizer for role, tokenizer in tokenizers.items() if tokenizer is not None}
    tables = {role: tokenizer.get_vocab() for role, tokenizer in known.items()}
    lengths = {role: max(table.values()) + 1 for role, table in tables.items()}
    common = min([*lengths.values(), *sizes.values()])
    if not tables:
        return common
    first_role, *others = sorted(tables, key=lambda role: role != "base")
    words = {role: _by_id(table, common) for role, table in tables.items()}
    for role in others:
        if words[role] == words[first_role]:
            continue
        pairs = enumerate(zip(words[first_role], words[role], strict=True))
        token_id, (mine, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"the vocabularies differ: token {token_id} is {mine!r} to the {first_role} and "
            f"{theirs!r} to the {role}; proxy-tuning needs models of one tokenizer"
        )
    added = {token.content for token in known[first_role].added_tokens_decoder.values()}
    beyond = {i: w for w, i in tables[first_role].items() if i >= common and w not in added}
    if beyond:
        lost = min(beyond)
        ends = {role: min(lengths[role], sizes.get(role, lengths[role])) for role in tables}
        short = min(ends, key=lambda role: ends[role])
        raise UserError(
            f"the vocabularies differ: the {first_role} has the token {beyond[lost]!r} "
            f"(id {lost}), but the {short} ends at id {common - 1}; "
            "proxy-tuning needs models of one tokenizer"
        )
    return common


def _by_id(table: Mapping[str, int], length: int) -> list[str | None]:
    """The token of each id below `length`; None for an id without one."""
    words: list[str | None] = [None] * length
    for word, token_id in table.items():
        if token_id < length:
            words[token_id] = word
    return words
