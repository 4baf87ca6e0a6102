"""The shortcut of a delta residual as a linear operator: its spectrum, inverse and products, without a D x D matrix.

With the direction and the gate of one token held fixed, ``X' = X + b k (v - k.X)`` is ``A X + b k v`` with
``A = I - b k k^T``. Everything here follows from ``b`` and the true length ``q = |k|`` (below 1 for a guarded
direction, off by rounding in low precision):

- eigenvalues: 1 (D - 1 times) and ``1 - b q^2``, with eigenvector ``k``; A is symmetric;
- ``det A = 1 - b q^2``, ``trace A = D - b q^2``; singular values 1 and ``|1 - b q^2|``, so that for ``b q^2`` in [0, 2]
  the shortcut never amplifies;
- ``A^T A = A^2 = I - b (2 - b q^2) k k^T``: orthogonal and an involution exactly when ``b q^2`` is 0 or 2;
  ``A^2 - A = -b (1 - b q^2) k k^T``: a projection exactly when it is 0 or 1;
- ``A^-1 = I + b / (1 - b q^2) k k^T``, with condition number ``1 / |1 - b q^2|``.

What this does not say: these are facts about the frozen shortcut. The layer itself computes ``k``, ``b`` and ``v`` from
the state; its Jacobian differentiates them too and can amplify, and as a function of ``X`` the layer is in general not
invertible.

Shapes: D width, V value channels, N updates. A state is (..., D), or (..., V, D) with several value channels, on each
of which A acts by itself; ``k`` is (..., D), ``b`` is (...), ``v`` is (...) or (..., V) to match.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ouroboros.errors import check

GAPS = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Inversion is refused where ``|1 - b q^2|`` is below this, by the least precise of its inputs."""


class Inverted(NamedTuple):
    """A state before an update, and how far errors of the state after it were amplified."""

    x: Tensor
    """The state, in the dtype of the state given."""
    condition: Tensor
    """Condition number of A, (...), float64."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """``A = I - b k k^T`` for each token; spectral quantities are float64. See the module for the formulas."""

    k: Tensor
    """Direction, (..., D)."""
    b: Tensor
    """Gate, (...)."""

    def __post_init__(self) -> None:
        wanted, given = tuple(self.k.shape[:-1]), tuple(self.b.shape)
        check(wanted == given, f"the gate needs the direction's shape without its width, {wanted}; got {given}")

    @property
    def square(self) -> Tensor:
        """``q^2 = |k|^2``, (...)."""
        return self.k.double().square().sum(-1)

    @property
    def eigenvalue(self) -> Tensor:
        """``1 - b q^2``, the eigenvalue along k; the update shrinks ``k.X - v`` by this factor, (...)."""
        return 1 - self.b.double() * self.square

    @property
    def determinant(self) -> Tensor:
        """``1 - b q^2``, (...): the other eigenvalues are 1."""
        return self.eigenvalue

    @property
    def trace(self) -> Tensor:
        """``D - b q^2``, (...)."""
        return self.k.shape[-1] - self.b.double() * self.square

    def eigenvalues(self) -> Tensor:
        """All D, ascending, (..., D)."""
        return self._beside_ones(self.eigenvalue).sort(-1).values

    def singular_values(self) -> Tensor:
        """All D, descending, (..., D)."""
        return self._beside_ones(self.eigenvalue.abs()).sort(-1, descending=True).values

    def _beside_ones(self, value: Tensor) -> Tensor:
        return torch.cat((value[..., None], value.new_ones(*value.shape, self.k.shape[-1] - 1)), dim=-1)

    @property
    def condition(self) -> Tensor:
        """Largest over smallest singular value, (...); infinite at an eigenvalue of 0."""
        size = self.eigenvalue.abs()
        if self.k.shape[-1] == 1:
            return torch.where(size > 0, torch.ones_like(size), torch.inf)
        return size.clamp(min=1) / size.clamp(max=1)

    @property
    def orthogonality_defect(self) -> Tensor:
        """Largest entry of ``|A^T A - I|``: ``b |2 - b q^2| max k_i^2``, (...)."""
        b, largest = self.b.double(), self.k.double().square().amax(-1)
        return (b * (1 + self.eigenvalue) * largest).abs()

    involution_defect = orthogonality_defect
    """Largest entry of ``|A A - I|``, (...): that of orthogonality, as A is symmetric."""

    @property
    def projection_defect(self) -> Tensor:
        """Largest entry of ``|A A - A|``: ``b |1 - b q^2| max k_i^2``, (...)."""
        b, largest = self.b.double(), self.k.double().square().amax(-1)
        return (b * self.eigenvalue * largest).abs()

    def apply(self, x: Tensor) -> Tensor:
        """``X - b k (k.X)`` of a state (..., D) or (..., V, D), in its dtype; summed in float32 or wider."""
        return self._add(x, -self.b)

    def _add(self, x: Tensor, factor: Tensor) -> Tensor:
        """``X + factor k (k.X)``."""
        wide = _wide(x, self.k)
        state, k, factor = x.to(wide), _beside(self.k, x).to(wide), _beside(factor[..., None], x, 1).to(wide)
        return (state + factor * (k * state).sum(-1, keepdim=True) * k).to(x.dtype)

    def inverse(self, x: Tensor, written: Tensor | float = 0.0) -> Inverted:
        """``A^-1 (X - written)``, where ``A^-1 Y = Y + b / (1 - b q^2) k (k.Y)``; computed in float64.

        Raises:
            OuroborosError: ``|1 - b q^2|`` is below the gap of :data:`GAPS` somewhere, or an input is narrower than
                float32.
        """
        dtypes = (x.dtype, self.k.dtype, self.b.dtype)
        for given in dtypes:
            check(
                given in GAPS,
                f"an update is inverted from float32 or float64, got {str(given).removeprefix('torch.')};"
                " record the state and the update in float32",
            )
        gap, smallest = max(GAPS[given] for given in dtypes), self.eigenvalue.abs().min().item()
        check(
            smallest >= gap,
            f"the update cannot be inverted: |1 - b |k|^2| is {smallest:.3g}, below {gap:g}, so the condition"
            f" number is {self.condition.max().item():.3g}; a gate of 1 erases, choose tokens whose gate is not 1"
            + ("" if gap == GAPS[torch.float64] else " or give float64 tensors"),
        )
        before = self._add(x.double() - written, self.b.double() / self.eigenvalue)
        return Inverted(before.to(x.dtype), self.condition)

    def dense(self) -> Tensor:
        """The matrix itself, (..., D, D), for comparison: everything else does without it."""
        D = self.k.shape[-1]
        outer = self.k[..., :, None] * self.k[..., None, :]
        return torch.eye(D, dtype=self.k.dtype, device=self.k.device) - self.b[..., None, None] * outer


def _beside(each: Tensor, x: Tensor, width: int | None = None) -> Tensor:
    """Numbers of each token (..., D), or (..., 1) with ``width`` 1, with an axis for the value channels of ``x``, if it
    has one."""
    each = each[..., None, :] if x.ndim == each.ndim + 1 else each
    check(
        x.ndim == each.ndim and each.shape[-1] == (width or x.shape[-1]),
        f"a state is (..., D) or (..., V, D) for directions (..., D); got {tuple(x.shape)} for {tuple(each.shape)}",
    )
    return each


def _wide(x: Tensor, k: Tensor) -> torch.dtype:
    """The dtype of sums: the wider of the two, float32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, k.dtype), torch.float32)


def _write(x: Tensor, k: Tensor, b: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """``b k v`` for every value channel of ``x``."""
    wanted, given = tuple(x.shape[:-1]), tuple(v.shape)
    check(wanted == given, f"targets for a state {tuple(x.shape)} are {wanted}, got {given}")
    amount = _beside(b[..., None], x, 1).to(dtype) * v[..., None].to(dtype)
    return amount * _beside(k, x).to(dtype)


def update(x: Tensor, k: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The whole update ``X' = A X + b k v``, in the dtype of ``x``."""
    wide = _wide(x, k)
    return (Erasure(k, b).apply(x.to(wide)) + _write(x, k, b, v, wide)).to(x.dtype)


def invert_update(x: Tensor, k: Tensor, b: Tensor, v: Tensor) -> Inverted:
    """``X = A^-1 (X' - b k v)``, with k, b and v held fixed; computed in float64.

    The state before the update had these very k, b and v: computed anew from the result they would be others.

    Raises:
        OuroborosError: as :meth:`Erasure.inverse`.
    """
    return Erasure(k, b).inverse(x, _write(x, k, b, v, torch.float64))


def trajectory(x: Tensor, k: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The states before, between and after N updates in a row: depth.

    Args:
        x: (..., D) or (..., V, D).
        k: (N, ..., D).
        b: (N, ...).
        v: (N, ...) or (N, ..., V).

    Returns:
        (N + 1, ..., [V,] D).
    """
    states = itertools.accumulate(zip(k, b, v), lambda state, terms: update(state, *terms), initial=x)
    return torch.stack(list(states))


def product(x: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """``A_N ... A_1 X`` for k (N, ..., D) and b (N, ...)."""
    for terms in zip(k, b):
        x = Erasure(*terms).apply(x)
    return x


def product_singular_values(k: Tensor, b: Tensor) -> Tensor:
    """Singular values of ``A_n ... A_1`` for each n, within the span of all directions; outside it they are 1.

    Two updates interact by the cross term ``b_i b_j (k_j.k_i) k_j k_i^T`` alone: they commute when their directions are
    parallel or orthogonal (or a gate is 0). A product therefore differs from I inside ``span{k}`` only, and has norm at
    most 1 for ``b q^2`` in [0, 2]. With the QR decomposition ``K = Q R`` of the D x N matrix of directions, the product
    inside the span is that of the same updates with the columns of R for directions.

    Args:
        k: (..., N, D), in order of execution.
        b: (..., N).

    Returns:
        (..., N, min(N, D)) descending, float64.
    """
    R = torch.linalg.qr(k.double().mT, mode="r").R
    m, N = R.shape[-2:]
    state = torch.eye(m, dtype=R.dtype, device=R.device).expand(*R.shape[:-2], m, m)
    products = []
    for at in range(N):
        # Rows of the state are vectors, so the rows of the identity become the columns of the product: its transpose.
        state = Erasure(R[..., at], b[..., at].double()).apply(state)
        products.append(state)
    return torch.linalg.svdvals(torch.stack(products, dim=-3))


def coherence(k: Tensor) -> Tensor:
    """``k_i . k_j`` between updates, signed: (..., N, D) to (..., N, N), float64."""
    k = k.double()
    return k @ k.mT


def deltanet(k: Tensor, b: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """The delta rule over time, ``M_t = M_(t-1) + b_t (v_t - M_(t-1) k_t) k_t^T`` (Schlag et al. 2021; DeltaNet).

    It is the update of a delta residual with time in the place of depth: for one list of k, b and v, the states are
    those of :func:`trajectory`. In DeltaNet k, b and v do not depend on M, so the recurrence can be computed in chunks;
    over depth they come from the state, so it cannot.

    Args:
        k: keys, (..., N, D).
        b: (..., N).
        v: values, (..., N, V).
        start: the memory at the start, (..., V, D); None means zeros.

    Returns:
        The memories, (..., N + 1, V, D).
    """
    memory = k.new_zeros(*k.shape[:-2], v.shape[-1], k.shape[-1]) if start is None else start
    states = [memory]
    for t in range(k.shape[-2]):
        key = k[..., t, :, None]
        error = v[..., t, :, None] - memory @ key
        memory = memory + b[..., t, None, None] * error @ key.mT
        states.append(memory)
    return torch.stack(states, dim=-3)
