"""Muon for many matrices at a time, its forms, and the choice of its precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ouroboros.config import OptimSpec

Polynomial = tuple[float, float, float]
"""``(a, b, c)``: a singular value ``x`` becomes ``a x + b x^3 + c x^5``."""


QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024."""


POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The best polynomial for each iteration where singular values are between 0.001 and 1 (Amsel et al. 2025, Algorithm
1); the last one is that of all further iterations."""


def muon_coefficients(spec: OptimSpec) -> tuple[Polynomial, ...]:
    """The polynomial of each Newton-Schulz iteration.

    As in the paper, values are divided by 1.01 before each one of Polar Express but the converged last, and once more
    at the start, so that rounding takes none of them out of the range where the next polynomial holds.
    """
    if spec.muon_coefficients == "quintic":
        return (QUINTIC,) * spec.muon_steps
    *first, last = POLAR_EXPRESS
    scaled = [_of_smaller(polynomial, 1.01) for polynomial in first]
    scaled[0] = _of_smaller(scaled[0], 1.01)
    return (*scaled, *[last] * spec.muon_steps)[: spec.muon_steps]


def _of_smaller(polynomial: Polynomial, factor: float) -> Polynomial:
    """The polynomial of ``x / factor``."""
    a, b, c = polynomial
    return a / factor, b / factor**3, c / factor**5


class BatchedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` that orthogonalises matrices of equal shape together, in a precision of choice.

    The mathematics and the state are those of ``torch.optim.Muon`` with Nesterov momentum and, by default, the learning
    rate matched to AdamW's RMS (Jordan et al. 2024; Liu et al. 2025, section 2.2). Stacking lets the products of small
    matrices use all cores: see docs/benchmarks.md.

    Args:
        params: two-dimensional parameters or groups of them.
        lr: peak update RMS is ``0.2 * lr``, as with AdamW.
        weight_decay: decoupled, multiplied by the learning rate.
        momentum: coefficient of the running average of gradients.
        coefficients: the polynomial of each Newton-Schulz iteration.
        rows: whether each row of the averaged gradient is divided by its length before.
        original: as first published: gradients are summed instead of averaged, the update is multiplied by
            ``sqrt(max(1, rows / columns))`` instead of ``0.2 sqrt(max(rows, columns))``, and every product is rounded.
        dtype: in which they are computed; ``torch.optim.Muon`` always takes bfloat16.
    """

    CHUNK_BYTES = 2**21
    """A stack holds about this many bytes, so that it stays in a core's cache."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        coefficients: tuple[Polynomial, ...] = (QUINTIC,) * 5,
        rows: bool = False,
        original: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        scale = "original" if original else "match_rms_adamw"
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=scale)
        self.coefficients, self.rows, self.original, self.dtype = coefficients, rows, original, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimisation step; ``closure``, if given, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (parameter.shape, parameter.dtype, parameter.device)
                    buckets.setdefault(key, []).append(parameter)
            for members in buckets.values():
                mesh = getattr(members[0], "device_mesh", None)
                least = 4 if mesh is None else max(4, mesh.size())  # so that every process has a matrix
                size = max(least, self.CHUNK_BYTES // (self.dtype.itemsize * members[0].numel()))
                for start in range(0, len(members), size):
                    self._step_stack(members[start : start + size], group)
        return loss

    def _step_stack(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape (R, C)."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._momentum(parameter) for parameter in parameters]
        momentum = group["momentum"]
        if self.original:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=momentum)
        else:
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            updates = torch._foreach_lerp(gradients, buffers, momentum)
        stack_NRC = torch.stack(list(updates))
        if self.rows:
            stack_NRC = stack_NRC / stack_NRC.norm(dim=2, keepdim=True).clamp(min=group["eps"])
        rows, columns = stack_NRC.shape[1:]

        def near(stack_NRC: Tensor) -> Tensor:
            tall = rows > columns
            wide_NRC = stack_NRC.mT.contiguous() if tall else stack_NRC
            wide_NRC = orthogonalize(wide_NRC, self.coefficients, group["eps"], fused=not self.original)
            return wide_NRC.mT if tall else wide_NRC

        stack_NRC = _of_whole_matrices(near, stack_NRC.to(self.dtype)).to(parameters[0].dtype)
        scale = math.sqrt(max(1, rows / columns)) if self.original else 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(stack_NRC), alpha=-scale * group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The running average or sum of the parameter's gradients, zero at first."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _of_whole_matrices(function: Callable[[Tensor], Tensor], stack_NRC: Tensor) -> Tensor:
    """``function`` of a stack of matrices. Where each process has some rows of all of them (a ``DTensor``), it is sent
    all rows of some of them instead, and sends back what it makes of those: the work is divided too."""
    if not hasattr(stack_NRC, "device_mesh"):
        return function(stack_NRC)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def redistributed(stack: Any, placements: Sequence[Any]) -> Any:
        if stack.device.type == "cpu":  # gloo cannot exchange parts, and torch says so with a warning
            stack = stack.redistribute(placements=[Replicate()])
        return stack.redistribute(placements=placements)

    by_row = stack_NRC.placements  # pyrefly: ignore
    spread = redistributed(stack_NRC, [Shard(0)])
    made = function(spread.to_local()).contiguous()
    form = {"shape": spread.shape, "stride": spread.stride(), "run_check": False}
    return redistributed(DTensor.from_local(made, spread.device_mesh, [Shard(0)], **form), by_row)


def orthogonalize(x_NRC: Tensor, coefficients: tuple[Polynomial, ...], eps: float, *, fused: bool = True) -> Tensor:
    """Newton-Schulz iteration of N matrices (N, R, C), R <= C: singular values go to about 1 (Jordan et al. 2024).

    One step, for each of ``coefficients``, is ``X <- M X`` with ``M = a I + b A + c A A`` and ``A = X X^T``; the
    Frobenius norm, at least ``eps``, scales X to spectral norm <= 1. Matrices at least twice as wide as high are not
    touched between the steps where float32 or better keeps small singular values apart: ``M`` and ``A`` commute, so
    ``A <- M A M`` gives the next ``A``, and the product of all ``M`` is applied once at the end. This takes 2 C/R + 17
    instead of 10 C/R + 5 products of R x R matrices.

    Args:
        x_NRC: the matrices.
        coefficients: the polynomial of each iteration.
        eps: smallest norm that divides.
        fused: add to a product before it is rounded. False rounds every product and sum, as programs did at first: in
            bfloat16 singular values then differ by up to 0.05, and the iteration takes up to 2.5 times as long.
    """
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    rows, columns = x_NRC.shape[1:]
    if not fused:
        for a, b, c in coefficients:
            gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
            x_NRC = a * x_NRC + torch.bmm(b * gram_NRR + torch.bmm(c * gram_NRR, gram_NRR), x_NRC)
        return x_NRC
    if columns < 2 * rows or torch.finfo(x_NRC.dtype).bits < 32:
        for a, b, c in coefficients:
            gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
            update_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            x_NRC = torch.baddbmm(x_NRC, update_NRR, x_NRC, beta=a)
        return x_NRC
    gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
    product_NRR = torch.eye(rows, dtype=x_NRC.dtype, device=x_NRC.device).expand_as(gram_NRR)
    for step, (a, b, c) in enumerate(coefficients, 1):
        update_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        product_NRR = torch.baddbmm(product_NRR, update_NRR, product_NRR, beta=a)
        if step < len(coefficients):
            half_NRR = torch.baddbmm(gram_NRR, update_NRR, gram_NRR, beta=a)
            gram_NRR = torch.baddbmm(half_NRR, half_NRR, update_NRR, beta=a)
    return torch.bmm(product_NRR, x_NRC)


def faster_dtype(shape: tuple[int, int], device: torch.device) -> torch.dtype:
    """Of float32 and bfloat16 the one that orthogonalises two matrices of ``shape`` faster; ties go to float32."""
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one is hardly disturbed by what else the machine does
    try:
        for turn in range(12):
            for dtype, seconds in fastest.items():
                # Where one is hopeless at first sight, it is not tried again: emulation can take a second.
                if turn > 1 and seconds > 4 * min(fastest.values()):
                    continue
                stack = torch.ones(2, *shape, dtype=dtype, device=device)
                begun = time.perf_counter()
                orthogonalize(stack, (QUINTIC, QUINTIC), 1e-7)[0, 0, 0].item()  # waits for the device
                if turn:  # the first turn warms up
                    fastest[dtype] = min(seconds, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return torch.bfloat16 if 1.3 * fastest[torch.bfloat16] < fastest[torch.float32] else torch.float32


def muon_momentum(step: int, spec: OptimSpec) -> float:
    """Muon's coefficient at optimiser step ``step`` (0-based), which may rise from ``muon_momentum_start``."""
    if step >= spec.muon_momentum_warmup:
        return spec.muon_momentum
    share = step / spec.muon_momentum_warmup
    return (1.0 - share) * spec.muon_momentum_start + share * spec.muon_momentum


def set_muon_momentum(optimizers: Iterable[torch.optim.Optimizer], momentum: float) -> None:
    """Set the coefficient of Muon's running average of the gradient."""
    for optimizer in optimizers:
        if isinstance(optimizer, BatchedMuon):
            for group in optimizer.param_groups:
                group["momentum"] = momentum
