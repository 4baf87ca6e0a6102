"""What a loop part sees of the state. Shapes: B batch, T positions, D channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros.config.parts.pooling import PooledPart
from ouroboros.nn.visit import VisitContext


def pooled(x_BTD: Tensor, visit: VisitContext, spec: PooledPart) -> Tensor:
    """What ``spec.pooling`` lets each position see of ``x``, (B, T, D), or (B, 1, D) where all see the same mean.

    Padding counts in no mean. What later calls need of this one is remembered with the visit.
    """
    if spec.pooling == "token":
        return x_BTD
    if visit.padding is not None:
        x_BTD = x_BTD * visit.padding[..., None].to(x_BTD.dtype)
    if spec.pooling == "all":
        count = x_BTD.shape[1] if visit.padding is None else visit.padding.sum(1)[:, None, None].clamp(min=1)
        return x_BTD.sum(1, keepdim=True) / count
    return _mean_of_prefix(x_BTD, visit, spec)


def _mean_of_prefix(x_BTD: Tensor, visit: VisitContext, spec: PooledPart) -> Tensor:
    """The mean of the positions up to each one, or of the first few; the sum so far is remembered in float32."""
    T, low = x_BTD.shape[1], x_BTD.dtype
    positions = torch.arange(T, device=x_BTD.device)[None] if visit.positions is None else visit.positions
    count = positions + 1
    sums = x_BTD.float()
    if spec.pooling == "prompt":
        sums = sums * (positions < spec.prompt)[..., None]
        count = count.clamp(max=spec.prompt)
    sums = sums.cumsum(1)
    if visit.memory is not None:
        past = visit.memory.last("controller")
        sums = sums if past is None else sums + past
        visit.memory.remember("controller", sums[:, -1:])
    return (sums / count[..., None]).to(low)
