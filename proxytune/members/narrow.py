"""Matrix products of two to five tokens on a CPU.

A layer should take as long for a few tokens as for one, because it reads its weights once in both
cases. But `torch.nn.functional.linear` in float32 takes up to twice as long: 8.0, 14.0 and 11.9 ms
for 1, 2 and 4 tokens (AMD EPYC, one thread, 31 million weights in layers 768 wide). The transposed
product, weights times tokens, takes 5.9 and 6.4 ms for 2 and 4 tokens, if the tokens fit into the
processor's first cache. If they do not (layers 4,096 wide), it takes 8.9 instead of 6.7 ms for 4
tokens, but 5.0 instead of 7.1 ms for 2.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# The transposed product is faster for at most TOKENS tokens. For two or three of them, a layer's
# input may be WIDTH wide; for four or five, tokens times that width may be ROOM.
TOKENS = 5
WIDTH = 4096
ROOM = 4096


def narrow_products(tokens: int, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model reads so many tokens (of all rows together) fastest."""
    if 1 < tokens <= TOKENS and device.type == "cpu":
        return NarrowProducts()
    return nullcontext()


class NarrowProducts(TorchFunctionMode):
    """While active, linear layers compute the transposed product where that is faster."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces `linear` where that is faster; runs every other function unchanged."""
        if func is torch.nn.functional.linear and not kwargs and _pays(*args[:2]):
            return _linear(*args)
        return func(*args, **kwargs or {})


def _pays(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the transposed product of these tokens and weights is faster."""
    count = tokens.numel() // max(1, weight.shape[-1])
    most = ROOM // count if count > 3 else WIDTH
    small = 1 < count <= TOKENS and weight.shape[-1] <= most
    return small and tokens.dtype == weight.dtype == torch.float32


def _linear(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` by the transposed product.

    Args:
        tokens: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    out = torch.mm(weight, flat.t()).t().contiguous()
    if bias is not None:
        out += bias
    return out.view(*tokens.shape[:-1], -1)
