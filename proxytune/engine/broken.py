"""Logits from which no token can be chosen: which member gave them, and what helps."""

import torch

from proxytune.engine.system import Pass
from proxytune.errors import UserError


def blame(seen: Pass) -> UserError:
    """The error about one place of a pass whose highest logit is not finite.

    Args:
        seen: the pass at that place; its logits are [vocab].
    """
    members = dict(seen.members) or {"model": seen.logits}
    for role, logits in members.items():
        odd = (~(logits < torch.inf)).nonzero().flatten().tolist()
        if odd:
            value = "NaN" if bool(logits[odd[0]].isnan()) else "infinity"
            return UserError(
                f"the {role} gives no probabilities: {len(odd)} of its {len(logits)} logits are "
                f"not finite (the first is {value}, of token {odd[0]}); load it in another dtype "
                "(bfloat16 or float32), and check its weights"
            )
    infinite = (~(seen.logits < torch.inf)).nonzero().flatten().tolist()
    if not infinite:
        return UserError("every token has a logit of minus infinity; there is none to choose")
    token = infinite[0]
    values = {role: float(logits[token]) for role, logits in members.items()}
    lowest = [role for role, value in values.items() if value == -torch.inf]
    shown = ", ".join(f"{value:.3g} from the {role}" for role, value in values.items())
    return UserError(
        f"the {' and the '.join(lowest) or 'triple'} makes the logit of token {token} infinite "
        f"({shown}): expert and antiexpert must give minus infinity to the same tokens; ban "
        "this one (banned=[...]), or choose a pair that agrees"
    )
