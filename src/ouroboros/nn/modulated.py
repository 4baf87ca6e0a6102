"""Low-rank additions to linear maps, and the cores that modulate them in each loop.

Ouroboros (arXiv 2604.02051; docs/systems/controller.md). Shapes: B batch, T positions, D model width, R rank, S style,
``...`` leading axes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts import modulated as specs
from ouroboros.nn.attention import Attention
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.part import Init, LoopModule, Projection, Started, ZeroProjection
from ouroboros.nn.visit import VisitContext


class LowRank(Started):
    """``factor * B M A x`` for a core M, a diagonal or a full matrix, that is given with each call.

    A starts with rows of about unit length, B as every matrix. Frozen, both keep their start or what was loaded.

    Args:
        linear: the map that it is added to.
        rank: R.
        factor: ``alpha / R``.
        frozen: give A and B no gradient.
        full: whether cores are full matrices.
    """

    PARAMETER_ROLES = {"A": "matrix", "B": "matrix"}

    def __init__(self, linear: nn.Linear, rank: int, factor: float, *, frozen: bool, full: bool = False) -> None:
        super().__init__()
        self.factor, self.frozen, self.full = factor, frozen, full
        self.A = nn.Parameter(torch.empty(rank, linear.in_features), requires_grad=not frozen)
        self.B = nn.Parameter(torch.empty(linear.out_features, rank), requires_grad=not frozen)
        self.untrained = frozenset(("A", "B") if frozen else ())
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """Normal: A with the deviation ``1 / sqrt(inputs)``, B with the model's."""
        nn.init.normal_(self.A, std=1 / math.sqrt(self.A.shape[1]))
        nn.init.normal_(self.B, std=1.0 if init is None else init.std)

    def forward(self, x: Tensor, core: Tensor) -> Tensor:
        """What is added to the map's result for ``x`` (..., inputs); ``core`` is a diagonal (..., R) or a matrix
        (..., R, R), for each position or for several."""
        A, B = (self.A.detach(), self.B.detach()) if self.frozen else (self.A, self.B)
        low, core = F.linear(x, A.to(x.dtype)), core.to(x.dtype)
        low = torch.einsum("...ij,...j->...i", core, low) if self.full else low * core
        return self.factor * F.linear(low, B.to(x.dtype))


class LowRankByLoop(nn.ModuleList):
    """An addition of its own for each loop; later loops use the last."""

    PARAMETERS_BY_LOOP = True


Modulated = specs.ModulatedAttentionSpec | specs.ModulatedFeedForwardSpec


def _bases(layer: nn.Module, targets: tuple[str, ...], spec: Modulated) -> nn.ModuleDict:
    make: dict[str, Any] = {"rank": spec.rank, "factor": spec.alpha / spec.rank}
    make |= {"frozen": spec.bases == "frozen", "full": spec.core == "full"}
    found: dict[str, nn.Module] = {}
    for name in targets:
        linear = getattr(layer, name)
        if spec.rows is None:
            found[name] = LowRank(linear, **make)
        else:
            found[name] = LowRankByLoop(LowRank(linear, **make) for _ in range(spec.rows))
    return nn.ModuleDict(found)


def _addition(bases: nn.Module, x: Tensor, visit: VisitContext, name: str) -> Tensor:
    """What the bases of a map add to its result in this visit."""
    if isinstance(bases, LowRankByLoop):
        assert visit.visit is not None
        bases = bases[min(visit.visit.loop, len(bases) - 1)]
    return bases(x, visit.handed[name])


class ModulatedAttention(Attention):
    """Attention with an addition to each of its maps, as the cores in ``visit.handed`` say."""

    def __init__(self, spec: specs.ModulatedAttentionSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__(spec, hidden_size, norm_eps)
        self.bases = _bases(self, specs.MIXER_TARGETS, spec)

    def project(self, name: str, x: Tensor, visit: VisitContext) -> Tensor:
        """What the map ``name`` and its addition make of ``x``."""
        return super().project(name, x, visit) + _addition(self.bases[name], x, visit, name)


class ModulatedFeedForward(FeedForward):
    """A gated feed-forward network with an addition to each of its maps."""

    def __init__(self, spec: specs.ModulatedFeedForwardSpec, width: int) -> None:
        super().__init__(spec.plain, width)
        self.bases = _bases(self, specs.FFN_TARGETS, spec)

    def project(self, name: str, x: Tensor, visit: VisitContext | None) -> Tensor:
        """What the map ``name`` and its addition make of ``x``."""
        assert visit is not None
        return super().project(name, x, visit) + _addition(self.bases[name], x, visit, name)


class StaticCores(LoopModule):
    """A learned diagonal, or a full matrix, for each loop and map."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, spec: specs.StaticDiagonalsSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(spec.rows or loops, len(specs.TARGETS), *_shape(spec)))

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def hand(self, x: Tensor, visit: VisitContext, loop: int) -> dict[str, Tensor]:
        """The row of this loop: a diagonal (R,) or a matrix (R, R) for each map."""
        row = self.weight[min(loop, len(self.weight) - 1)]
        return dict(zip(specs.TARGETS, row, strict=True))


def _shape(spec: specs.StaticDiagonalsSpec | specs.ControllerSpec) -> tuple[int, ...]:
    """The shape of a core."""
    return (spec.rank, spec.rank) if spec.makes == "full" else (spec.rank,)


class Controller(LoopModule):
    """Cores of the state that begins a loop: ``u = silu(P x)``; ``z = silu(V silu(U [u; e_loop]))``; ``m = H z`` for
    each map (Controller, section 2.4)."""

    PARAMETER_ROLES = {"steps": "vector"}

    def __init__(self, spec: specs.ControllerSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.spec, self.eps, S = spec, norm_eps, spec.style
        self.state_proj = _Uniform(width, 2 * S)
        self.steps = nn.Parameter(torch.empty(spec.rows or loops, S))
        self.style_in = _Uniform(3 * S, 2 * S)
        self.style_out = _Uniform(2 * S, S)
        self.heads = nn.ModuleDict({name: ZeroProjection(S, math.prod(_shape(spec))) for name in specs.TARGETS})
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The table of loops standard normal; the maps inside start by themselves."""
        nn.init.normal_(self.steps)

    def hand(self, x: Tensor, visit: VisitContext, loop: int) -> dict[str, Tensor]:
        """A core for each map: (B, T, R) or (B, T, R, R) of what each position may see, or (B, 1, ...) of all of
        them."""
        seen = self._seen(x, visit)
        u = F.silu(self.state_proj(seen))
        step_S = self.steps[min(loop, len(self.steps) - 1)].to(u.dtype)
        z = F.silu(self.style_in(torch.cat((u, step_S.expand(*u.shape[:-1], -1)), dim=-1)))
        z = F.silu(self.style_out(z))
        return {name: head(z).unflatten(-1, _shape(self.spec)) for name, head in self.heads.items()}

    def _seen(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """The pooled state, (B, T, D) or (B, 1, D)."""
        if self.spec.norm:
            x_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)
        if self.spec.pooling == "token":
            return x_BTD
        if visit.padding is not None:
            x_BTD = x_BTD * visit.padding[..., None].to(x_BTD.dtype)
        if self.spec.pooling == "all":
            count = x_BTD.shape[1] if visit.padding is None else visit.padding.sum(1)[:, None, None].clamp(min=1)
            return x_BTD.sum(1, keepdim=True) / count
        return self._mean_of_prefix(x_BTD, visit)

    def _mean_of_prefix(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """The mean of the positions up to each one, or of the first few; the sum so far is remembered in float32."""
        T, low = x_BTD.shape[1], x_BTD.dtype
        positions = torch.arange(T, device=x_BTD.device)[None] if visit.positions is None else visit.positions
        count = positions + 1
        sums = x_BTD.float()
        if self.spec.pooling == "prompt":
            sums = sums * (positions < self.spec.prompt)[..., None]
            count = count.clamp(max=self.spec.prompt)
        sums = sums.cumsum(1)
        if visit.memory is not None:
            past = visit.memory.last("controller")
            sums = sums if past is None else sums + past
            visit.memory.remember("controller", sums[:, -1:])
        return (sums / count[..., None]).to(low)


class _Uniform(Started, Projection):
    """A linear map whose weights and biases start uniformly within ``1 / sqrt(inputs)``, as published."""

    def reset_parameters(self, init: Init | None = None) -> None:
        """Uniform."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
