"""Tokens of the base that its helpers do not have: a formula leaves them alone."""

from collections.abc import Collection, Mapping, Sequence

import torch


class Unshifted:
    """The ids of the base that helpers have no token for.

    A helper then agrees with the base about such a token: its log-probability is the base's. So
    proxy-tuning leaves the token's logit as it is, and what a constant added to all logits of a
    helper would change is nothing.

    Args:
        ids: role -> the ids that its pair lacks, in the shared vocabulary; [] where none is
            lacking, but the helper has tokens that the base lacks.
        log_probs: the roles that give log-probabilities over a vocabulary of their own, of which
            those of tokens that the base lacks are missing. The others give logits over the shared
            vocabulary.
    """

    def __init__(self, ids: Mapping[str, Sequence[int]], log_probs: Collection[str] = ()) -> None:
        self._ids = {role: torch.tensor(each, dtype=torch.long) for role, each in ids.items()}
        self._all = torch.tensor(sorted({i for each in ids.values() for i in each})).long()
        self._log_probs = frozenset(log_probs)

    def leave(self, logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replaces the helpers' logits by log-probabilities that agree with the base's at `ids`.

        Args:
            logits: role -> that member's over the base's ids, [..., vocab]; changed in place, by
                new tensors.

        Returns:
            See `Pass.unshifted`.
        """
        base = logits["base"].float().log_softmax(-1)
        shares = {"base": base[..., self._all.to(base.device)].exp().sum(-1)}
        for role, ids in self._ids.items():
            ids = ids.to(base.device)
            own = logits[role].float()
            own = own.clone() if role in self._log_probs else own.log_softmax(-1)
            own[..., ids] = -torch.inf
            shares[role] = (1 - own.exp().sum(-1)).clamp(0, 1)
            own[..., ids] = base[..., ids]
            logits[role] = own
        return shares
