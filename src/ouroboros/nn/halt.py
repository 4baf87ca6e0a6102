"""Halting of each token (Graves 2016, arXiv 1603.08983). Shapes: D model width, ``...`` the leading axes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.nn.part import LoopModule, Projection
from ouroboros.nn.small import ZeroLinear


class Halt(LoopModule):
    """``y = sum_l w_l z_l``: w is the probability p of a state while its token runs, what is left to one where p would
    exceed that, and nothing from there on; the last loop gets what is left."""

    def __init__(self, spec: HaltSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.first = Projection(width, spec.hidden)
        self.second = Projection(spec.hidden, spec.hidden)
        self.last = ZeroLinear(spec.hidden, 1, bias=spec.bias)

    def probability(self, z: Tensor) -> Tensor:
        """That a token halts with state (..., D), (..., 1)."""
        hidden = F.silu(self.second(F.silu(self.first(z))))
        return torch.sigmoid(self.last(hidden).float())

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state itself, which is added to the mean."""
        p = self.probability(z)
        total = carried.get("halt.total", torch.zeros_like(p))
        weight, carried["halt.total"] = weigh(p, total)
        carried["halt.mean"] = carried.get("halt.mean", 0.0) + weight.to(z.dtype) * z
        return z

    def finish(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """The mean, in which tokens that still run give their last state the rest."""
        return carried["halt.mean"] + (1 - carried["halt.total"]).to(z.dtype) * z


def weigh(p: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of a state with probability ``p``, and the sum of weights with it.

    The sum of a token that has halted is one, so that later states have a weight of zero.
    """
    halts = total + p >= 1
    return torch.where(halts, 1 - total, p), torch.where(halts, torch.ones_like(total), total + p)
