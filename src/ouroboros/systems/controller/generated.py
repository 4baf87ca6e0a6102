"""Linear maps with additions that a loop generates, and the Controller that makes their coefficients.

The first generation of Ouroboros (arXiv 2604.02051; docs/systems/controller.md). Shapes: B batch, T positions, D model
width, N bases, ``...`` leading axes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.modulated import FFN_TARGETS, MIXER_TARGETS, TARGETS
from ouroboros.nn.attention import Attention
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.modulated import UniformLinear
from ouroboros.nn.part import Init, LoopModule, Started, ZeroProjection
from ouroboros.nn.pooling import pooled
from ouroboros.nn.visit import VisitContext
from ouroboros.systems.controller import parts


class Generated(Started):
    """``factor * B A x`` with ``A = sum_n a_n A1_n A2_n`` and ``B = sum_n b_n B1_n B2_n``, for coefficients a and b
    that are given with each call. The matrices themselves are never made, so that each token may have its own.

    Args:
        linear: the map that it is added to.
        spec: the part that the map belongs to.
    """

    PARAMETER_ROLES = dict.fromkeys(("A1", "A2", "B1", "B2"), "vector")

    def __init__(self, linear: nn.Linear, spec: Any) -> None:
        super().__init__()
        self.factor = spec.alpha / spec.rank
        inner, outer = spec.inner(linear.in_features), spec.inner(linear.out_features)
        self.A1 = nn.Parameter(torch.empty(spec.bases, spec.rank, inner))
        self.A2 = nn.Parameter(torch.empty(spec.bases, inner, linear.in_features))
        self.B1 = nn.Parameter(torch.empty(spec.bases, linear.out_features, outer))
        self.B2 = nn.Parameter(torch.empty(spec.bases, outer, spec.rank))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """Uniform within one divided by the root of the last size, as published."""
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """What is added to the map's result for ``x`` (..., inputs); ``coefficients`` (..., 2 N), those of A first, may
        be of fewer positions."""
        a_N, b_N = coefficients.to(x.dtype).chunk(2, dim=-1)
        weighted = _weighted if self.folds else _weighted_one_by_one
        return self.factor * weighted(weighted(x, a_N, self.A1, self.A2), b_N, self.B1, self.B2)


def _weighted(x: Tensor, weights_N: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``sum_n w_n first_n second_n x`` for matrices (N, outputs, inner) and (N, inner, inputs)."""
    inner = F.linear(x, second.flatten(0, 1).to(x.dtype)).unflatten(-1, second.shape[:2])
    weighted = (inner * weights_N[..., None]).flatten(-2)
    return F.linear(weighted, first.transpose(0, 1).flatten(1).to(x.dtype))


def _weighted_one_by_one(x: Tensor, weights_N: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The same, each of the matrices applied by itself."""
    pairs = zip(weights_N.split(1, dim=-1), first, second, strict=True)
    terms = [F.linear(w * F.linear(x, inner.to(x.dtype)), outer.to(x.dtype)) for w, outer, inner in pairs]
    return torch.stack(terms).sum(dim=0)


class GeneratedAttention(Attention):
    """Attention with an addition to each of its maps where ``visit.handed`` has its coefficients."""

    def __init__(self, spec: parts.GeneratedAttentionSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__(spec, hidden_size, norm_eps)
        self.bases = nn.ModuleDict({name: Generated(getattr(self, name), spec) for name in MIXER_TARGETS})

    def project(self, name: str, x: Tensor, visit: VisitContext) -> Tensor:
        """What the map ``name`` and its addition make of ``x``."""
        plain = super().project(name, x, visit)
        return plain + self.bases[name](x, visit.handed[name]) if name in visit.handed else plain


class GeneratedFeedForward(FeedForward):
    """A gated feed-forward network with an addition to each of its maps where ``visit.handed`` has its coefficients."""

    def __init__(self, spec: parts.GeneratedFeedForwardSpec, width: int) -> None:
        super().__init__(spec, width)
        self.bases = nn.ModuleDict({name: Generated(getattr(self, name), spec) for name in FFN_TARGETS})

    def project(self, name: str, x: Tensor, visit: VisitContext | None) -> Tensor:
        """What the map ``name`` and its addition make of ``x``."""
        plain = super().project(name, x, visit)
        handed = {} if visit is None else visit.handed
        return plain + self.bases[name](x, handed[name]) if name in handed else plain


class MatrixController(LoopModule):
    """Coefficients of the state that begins a loop: ``z = W silu(V silu(U [silu(P x); e_loop; q p]))`` and ``[a; b] = H
    z`` for each map, with p the probability of having halted (section 6.2)."""

    PARAMETER_ROLES = {"steps": "vector"}

    def __init__(self, spec: parts.MatrixControllerSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.spec, self.eps = spec, norm_eps
        self.state_proj = UniformLinear(width, spec.state)
        self.steps = nn.Parameter(torch.empty(spec.rows or loops, spec.steps))
        if spec.confidence:
            self.halt_proj = UniformLinear(1, spec.confidence)
        self.style_in = UniformLinear(spec.state + spec.steps + spec.confidence, spec.hidden)
        self.style_middle = UniformLinear(spec.hidden, spec.hidden)
        self.style_out = UniformLinear(spec.hidden, spec.style)
        zero = lambda: ZeroProjection(spec.style, spec.bases)  # noqa: E731
        drawn = lambda: UniformLinear(spec.style, spec.bases, bias=False)  # noqa: E731
        self.heads_A = nn.ModuleDict({name: zero() if spec.start == "saddle" else drawn() for name in TARGETS})
        self.heads_B = nn.ModuleDict({name: zero() for name in TARGETS})
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The table of loops standard normal; the maps inside start by themselves."""
        nn.init.normal_(self.steps)

    def hand(self, x: Tensor, visit: VisitContext, loop: int) -> dict[str, Tensor]:
        """Coefficients of each map: (B, T, 2 N) of what each position may see, or (B, 1, 2 N) of all of them."""
        width = x.shape[-1]
        state = F.rms_norm(x, (width,), eps=self.eps) if self.spec.norm else x
        if self.spec.confidence:
            halted = visit.looped.get("halt.total", x.new_zeros(*x.shape[:-1], 1))
            state = torch.cat((state, halted.to(x.dtype)), dim=-1)
        seen, *halted = pooled(state, visit, self.spec).split([width, *[1] * (self.spec.confidence > 0)], dim=-1)
        u = F.silu(self.state_proj(seen))
        step = self.steps[min(loop, len(self.steps) - 1)].to(u.dtype).expand(*u.shape[:-1], -1)
        z = torch.cat((u, step, *map(self.halt_proj, halted)), dim=-1) if halted else torch.cat((u, step), dim=-1)
        z = self.style_out(F.silu(self.style_middle(F.silu(self.style_in(z)))))
        return {name: torch.cat((self.heads_A[name](z), self.heads_B[name](z)), dim=-1) for name in TARGETS}
