"""Matrix products of two to five tokens on a CPU.

A layer should cost for a few tokens what it costs for one, since its weights are read once either
way; but `torch.nn.functional.linear` in float32 takes up to twice as long (AMD EPYC, one thread,
31 million weights in layers 768 wide: 8.0, 14.0, 11.9 ms for 1, 2, 4 tokens). The same product
written the other way round, weights times tokens, takes 5.9 and 6.4 ms for 2 and 4, as long as
the tokens fit into the processor's first cache. (Where they do not, 4 tokens take 8.9 instead of
6.7 ms in layers 4,096 wide, but 2 take 5.0 instead of 7.1.)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TOKENS = 5  # up to which this is faster
WIDTH = 4096  # of a layer's input, up to which this is faster for two or three tokens
ROOM = 4096  # tokens times that width, up to which it is for four or five


def narrow_products(tokens: int, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model reads so many tokens, over all rows, fastest."""
    if 1 < tokens <= TOKENS and device.type == "cpu":
        return NarrowProducts()
    return nullcontext()


class NarrowProducts(TorchFunctionMode):
    """While active, linear layers on few tokens are computed the faster way round."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces `linear` where it pays; everything else runs as it is."""
        if func is torch.nn.functional.linear and not kwargs and _pays(*args[:2]):
            return _linear(*args)
        return func(*args, **kwargs or {})


def _pays(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product is of the kind that the other way round is faster."""
    count = tokens.numel() // max(1, weight.shape[-1])
    most = ROOM // count if count > 3 else WIDTH
    small = 1 < count <= TOKENS and weight.shape[-1] <= most
    return small and tokens.dtype == weight.dtype == torch.float32


def _linear(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`: [..., in], [out, in], [out] -> [..., out]."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    out = torch.mm(weight, flat.t()).t().contiguous()
    if bias is not None:
        out += bias
    return out.view(*tokens.shape[:-1], -1)
