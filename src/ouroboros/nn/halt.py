"""Halting of each token (Graves 2016, arXiv 1603.08983). Shapes: B batch, T positions, D model width, L loops, ``...``
the leading axes, which are B, T and maybe value channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.nn.part import LoopModule, Projection
from ouroboros.nn.small import ZeroLinear


class Halt(LoopModule):
    """``y = sum_l w_l z_l``: w is the probability p of a state while its token runs, what is left to one where p would
    exceed that, and nothing from there on; the last loop gets what is left.

    With ``freeze`` a token that has halted goes on to no further loop: what that means for its state, its keys and its
    values is said in :mod:`ouroboros.model.stopping`. Where a state has several value channels each halts by itself,
    and the token with the last of them.
    """

    def __init__(self, spec: HaltSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.spec, self.stops = spec, spec.freeze
        self.first = Projection(width, spec.hidden)
        self.second = Projection(spec.hidden, spec.hidden)
        self.last = ZeroLinear(spec.hidden, 1, bias=spec.bias)

    def probability(self, z: Tensor) -> Tensor:
        """That a token halts with state (..., D), (..., 1)."""
        hidden = F.silu(self.second(F.silu(self.first(z))))
        return torch.sigmoid(self.last(hidden).float())

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state itself, which is added to the mean."""
        p = carried["halt.probability"] = self.probability(z)
        total = carried.get("halt.total", torch.zeros_like(p))
        carried["halt.ran"] = total < 1
        weight, carried["halt.total"] = weigh(p, total)
        carried["halt.mean"] = carried.get("halt.mean", 0.0) + weight.to(z.dtype) * z
        if self.training and self.spec.cost != "none":
            carried["halt.weights"] = torch.cat((*(carried[n] for n in ("halt.weights",) if loop), weight), dim=-1)
        return z

    def finish(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """The mean, in which tokens that still run give their last state the rest."""
        return carried["halt.mean"] + (1 - carried["halt.total"]).to(z.dtype) * z

    def goes_on(self, carried: dict[str, Tensor]) -> Tensor:
        """The tokens that have not halted."""
        return (carried["halt.total"] < 1).flatten(2).any(dim=-1)

    def tell(self, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whether a token ``ran`` in this loop and has ``halted`` behind it, and the ``probability`` of its state."""
        return {
            "ran": carried["halt.ran"].flatten(2).any(dim=-1),
            "halted": ~self.goes_on(carried),
            "probability": carried["halt.probability"].flatten(2).mean(dim=-1),
        }

    def auxiliary_loss(self, carried: dict[str, Tensor]) -> Tensor | None:
        """The cost of each token, (B, T), times its weight: its steps and the weight of its last state (Graves 2016,
        equation 5), which is higher the later it halts and whose gradient is that of the weight; or ``KL(w || q)`` with
        ``q_l = a (1 - a)^l / (1 - (1 - a)^L)`` (Banino et al. 2021, equation 6)."""
        if self.spec.cost == "none":
            return None
        *_, last_weight = carried["halt.weights"].split(1, dim=-1)
        rest = last_weight + 1 - carried["halt.total"]
        weights = torch.cat((carried["halt.weights"][..., :-1], rest), dim=-1)
        steps = (weights > 0).sum(dim=-1, keepdim=True)
        if self.spec.cost == "steps":
            cost = steps + weights.gather(-1, steps - 1)
        else:
            a, loops = self.spec.prior, weights.shape[-1]
            later = torch.arange(loops, device=weights.device) * math.log1p(-a)
            log_prior = math.log(a) + later - math.log1p(-((1 - a) ** loops))
            # A weight of zero adds nothing, and its logarithm must not make the gradient infinite.
            log_weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
            cost = (weights * (log_weights - log_prior)).sum(dim=-1, keepdim=True)
        return self.spec.cost_weight * cost.flatten(2).mean(dim=-1)


def weigh(p: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of a state with probability ``p``, and the sum of weights with it.

    The sum of a token that has halted is one, so that later states have a weight of zero.
    """
    halts = total + p >= 1
    return torch.where(halts, 1 - total, p), torch.where(halts, torch.ones_like(total), total + p)
