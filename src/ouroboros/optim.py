"""Optimisers by parameter role, and learning-rate schedules as pure functions of the run's progress.

Every parameter has one role: ``matrix`` (Muon; decayed), ``embedding`` (AdamW: tables and the head), ``vector`` (AdamW:
norms, gains, biases, per-loop rows) or ``scalar`` (AdamW: single numbers that steer a part as a whole). A module class
with direct parameters that the rules cannot place, or that are scalars, declares ``PARAMETER_ROLES = {"attribute":
"role"}``. Parameters that a module never trains, by its specification, stand in its ``untrained``.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config import OptimSpec
from ouroboros.errors import OuroborosError, check, nearest

ROLES = ("matrix", "embedding", "vector", "scalar")


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter of ``model`` by name; a parameter under several names counts once, as the first.

    The rules, first match wins: the owning class's ``PARAMETER_ROLES``; the weight of ``nn.Embedding`` and of an
    ``nn.Linear`` whose attribute name is ``lm_head`` is an ``embedding``; the weight of any other ``nn.Linear`` is a
    ``matrix``; a parameter of fewer than two dimensions is a ``vector``.

    Raises:
        OuroborosError: a parameter no rule places, an unknown role, a ``matrix`` that is not two-dimensional, a
            ``scalar`` that is, or a tied parameter whose names have different roles.
    """
    roles: dict[str, str] = {}
    first_name: dict[Tensor, str] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            role = _role(name, path.rpartition(".")[2], attribute, module, parameter)
            first = first_name.setdefault(parameter, name)
            check(
                roles.setdefault(first, role) == role,
                f"parameter {first} ({roles[first]}) is tied to {name} ({role}): tied parameters need one role",
            )
    return roles


def _role(name: str, module_name: str, attribute: str, module: nn.Module, parameter: Tensor) -> str:
    """The role of one direct parameter of ``module``."""
    declared: dict[str, str] = getattr(type(module), "PARAMETER_ROLES", {})
    if attribute in declared:
        role, shape = declared[attribute], tuple(parameter.shape)
        where = f"{type(module).__name__}.PARAMETER_ROLES[{attribute!r}]"
        check(role in ROLES, f"{where} is {role!r}{nearest(role, ROLES)}")
        check(role != "matrix" or len(shape) == 2, f"{where}: {name} has shape {shape}, not 2-D")
        check(role != "scalar" or len(shape) < 2, f"{where}: {name} has shape {shape}, not one number or a list")
        return role
    if attribute == "weight" and isinstance(module, nn.Embedding):
        return "embedding"
    if attribute == "weight" and isinstance(module, nn.Linear):
        return "embedding" if module_name == "lm_head" else "matrix"
    if parameter.ndim < 2:
        return "vector"
    raise OuroborosError(
        f"parameter {name} of shape {tuple(parameter.shape)} belongs to no group; declare"
        f" PARAMETER_ROLES = {{{attribute!r}: ...}} on {type(module).__name__}"
    )


def untrained_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are never trained, by specification; a tied one under its first name.

    A module declares its own in an instance attribute ``untrained``, a set of dotted names relative to the module. Its
    arithmetic gives them no gradient, whatever their ``requires_grad`` says.

    Raises:
        OuroborosError: a declared name that is no parameter of its module.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = set()
    for path, module in model.named_modules():
        declared: frozenset[str] = getattr(module, "untrained", frozenset())
        own = dict(module.named_parameters(remove_duplicate=False)) if declared else {}
        for name in declared:
            where = f"{type(module).__name__}.untrained of {path or 'the model'}"
            check(name in own, f"{where}: {name!r} is no parameter{nearest(name, own)}")
            found.add(names[own[name]])
    return found


def left_out_parameters(model: nn.Module, spec: OptimSpec) -> set[str]:
    """Names of the parameters that ``spec.left_out`` keeps out of every optimiser; a tied one under its first name.

    Raises:
        OuroborosError: a pattern that no parameter's name matches.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in spec.left_out:
        matching = fnmatch.filter(names, pattern)
        check(bool(matching), f"optim.left_out: {pattern!r} is the name of no parameter{nearest(pattern, names)}")
        found.update(matching)
    return found


def build_optimizers(
    model: nn.Module, spec: OptimSpec, *, muon_dtype: torch.dtype | None = None
) -> list[torch.optim.Optimizer]:
    """Muon for trainable matrices and AdamW for the rest, or AdamW for all with ``matrix_optimizer="adamw"``.

    Every trainable parameter that ``spec.left_out`` does not name is in exactly one group. Groups carry ``role`` and
    ``peak_lr``; :func:`set_learning_rate` scales the latter. Only matrices are decayed, or every group with
    ``decay="all"``.

    Args:
        model: parameters that do not require a gradient or are untrained by specification are left out.
        spec: rates, decay, momentum.
        muon_dtype: in which Muon orthogonalises; None takes what ``spec.muon_precision`` says, see
            :func:`choose_muon_dtype`.

    Raises:
        OuroborosError: no trainable parameter, or one without a role (see :func:`parameter_roles`).
    """
    trainable = _trainable(model, spec)
    vector_lr = spec.vector_lr or spec.lr
    rates = {
        "matrix": spec.lr,
        "embedding": spec.embedding_lr or spec.lr,
        "vector": vector_lr,
        "scalar": spec.scalar_lr or vector_lr,
    }
    groups: dict[str, dict[str, Any]] = {}
    for role in ROLES:
        decay = spec.weight_decay if role == "matrix" or spec.decay == "all" else 0.0
        groups[role] = {"params": [], "role": role, "lr": rates[role], "peak_lr": rates[role], "weight_decay": decay}
    for name, role in parameter_roles(model).items():
        if name in trainable:
            groups[role]["params"].append(trainable[name])
    groups = {role: group for role, group in groups.items() if group["params"]}
    without = " and that optim.left_out does not name" if spec.left_out else ""
    check(bool(groups), f"the model has no parameter that requires a gradient{without}: nothing to train")
    optimizers: list[torch.optim.Optimizer] = []
    if spec.matrix_optimizer == "muon" and "matrix" in groups:
        dtype = choose_muon_dtype(model, spec) if muon_dtype is None else muon_dtype
        optimizers.append(
            BatchedMuon(
                [groups.pop("matrix")],
                momentum=spec.muon_momentum,
                coefficients=muon_coefficients(spec),
                rows=spec.muon_rows,
                original=spec.muon_form == "original",
                dtype=dtype,
            )
        )
    if groups:
        # One kernel for a step where torch has it: 5 times as fast on a CPU.
        fused = {p.device.type for group in groups.values() for p in group["params"]} <= {"cpu", "cuda"}
        optimizers.append(torch.optim.AdamW(list(groups.values()), betas=spec.betas, eps=spec.eps, fused=fused))
    return optimizers


def _trainable(model: nn.Module, spec: OptimSpec) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    others = untrained_parameters(model) | left_out_parameters(model, spec)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in others}


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
                size = max(4, self.CHUNK_BYTES // (self.dtype.itemsize * members[0].numel()))
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
        stack_NRC = stack_NRC.to(self.dtype)
        rows, columns = stack_NRC.shape[1:]
        tall = rows > columns
        wide_NRC = stack_NRC.mT.contiguous() if tall else stack_NRC
        wide_NRC = orthogonalize(wide_NRC, self.coefficients, group["eps"], fused=not self.original)
        stack_NRC = (wide_NRC.mT if tall else wide_NRC).to(parameters[0].dtype)
        scale = math.sqrt(max(1, rows / columns)) if self.original else 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(stack_NRC), alpha=-scale * group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The running average or sum of the parameter's gradients, zero at first."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


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


def choose_muon_dtype(model: nn.Module, spec: OptimSpec) -> torch.dtype:
    """The precision in which Muon orthogonalises the trainable matrices of ``model``, as ``spec.muon_precision`` says.

    ``auto`` times iterations on matrices of the shape that has most numbers, on the model's device, and takes bfloat16
    where it is at least 1.3 times as fast as float32: a processor that emulates bfloat16 is many times slower. Shapes
    below 128 are timed at 128, where products and not the calls decide, so that two runs choose alike.
    """
    if spec.muon_precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.muon_precision]
    roles, trainable = parameter_roles(model), _trainable(model, spec)
    matrices = [p for name, p in trainable.items() if roles[name] == "matrix"]
    if spec.matrix_optimizer != "muon" or not matrices or matrices[0].device.type == "meta":
        return torch.float32
    numbers: Counter[tuple[int, int]] = Counter()
    for p in matrices:
        numbers[(min(p.shape), max(p.shape))] += p.numel()
    rows, columns = max(numbers, key=lambda shape: (numbers[shape], shape))
    return _faster_dtype((max(rows, 128), max(columns, 128)), matrices[0].device)


def _faster_dtype(shape: tuple[int, int], device: torch.device) -> torch.dtype:
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


def learning_rate(progress: float, spec: OptimSpec, steps: float = math.inf) -> float:
    """The share of the peak rate at ``progress`` in [0, 1] through the run; values outside are clipped.

    All schedules but ``one_cycle`` rise linearly over ``warmup_fraction``. ``wsd`` is then flat and falls linearly to
    ``final_lr`` over the last ``decay_fraction`` or ``decay_steps`` (Hu et al. 2024), from a lower rate where the run
    has fewer steps; ``cosine`` falls to ``final_lr`` by a half cosine (Loshchilov and Hutter 2017); ``constant`` stays.
    The rate is 0 at progress 0 with warm-up, and ``final_lr`` at 1: pass the middle of the step about to be taken, for
    example ``(step + 0.5) / steps``, so that neither end wastes a step.

    ``one_cycle`` (Smith and Topin 2019) rises from ``start_lr`` to the peak and falls to ``final_lr``, by half cosines,
    in the steps of ``torch.optim.lr_scheduler.OneCycleLR``: the first step has exactly ``start_lr``, the peak lies at
    step ``warmup_fraction * steps - 1`` (0-based), the last step has exactly ``final_lr``.

    Args:
        progress: the middle of a step as a share of the run.
        spec: shape of the schedule.
        steps: of the whole run, known or estimated; ``one_cycle`` and ``decay_steps`` alone ask. Infinity is the limit
            of many steps.
    """
    progress = min(max(progress, 0.0), 1.0)
    if spec.schedule == "one_cycle":
        rising, share = _one_cycle(progress, spec, steps)
        return _half_cosine(spec.start_lr, 1.0, share) if rising else _half_cosine(1.0, spec.final_lr, share)
    rise = progress / spec.warmup_fraction if progress < spec.warmup_fraction else 1.0
    if spec.schedule == "wsd":
        remaining, share = 1.0 - progress, spec.decay_fraction if spec.decay_steps is None else spec.decay_steps / steps
        falls = remaining < share
        return min(rise, spec.final_lr + (1.0 - spec.final_lr) * remaining / share) if falls else rise
    if spec.schedule == "constant" or progress < spec.warmup_fraction:
        return rise
    span = 1.0 - spec.warmup_fraction
    return _half_cosine(1.0, spec.final_lr, (progress - spec.warmup_fraction) / span if span > 0 else 1.0)


def first_beta(progress: float, spec: OptimSpec, steps: float = math.inf) -> float:
    """AdamW's first coefficient; arguments as for :func:`learning_rate`, whose ``one_cycle`` it mirrors.

    With ``momentum_cycle`` (low, high) it falls from high to low while the rate rises and comes back while the rate
    falls; without, it is ``betas[0]`` all along.
    """
    if spec.momentum_cycle is None:
        return spec.betas[0]
    low, high = spec.momentum_cycle
    rising, share = _one_cycle(min(max(progress, 0.0), 1.0), spec, steps)
    return _half_cosine(high, low, share) if rising else _half_cosine(low, high, share)


def muon_momentum(step: int, spec: OptimSpec) -> float:
    """Muon's coefficient at optimiser step ``step`` (0-based), which may rise from ``muon_momentum_start``."""
    if step >= spec.muon_momentum_warmup:
        return spec.muon_momentum
    share = step / spec.muon_momentum_warmup
    return (1.0 - share) * spec.muon_momentum_start + share * spec.muon_momentum


def _one_cycle(progress: float, spec: OptimSpec, steps: float) -> tuple[bool, float]:
    """Whether the rate rises, and the share of that phase which is over, at the middle ``progress`` of a step."""
    step = 1.0 / steps
    here, peak, end = progress - 0.5 * step, spec.warmup_fraction - step, 1.0 - step
    if here <= peak:
        return True, max(here, 0.0) / peak if peak > 0 else 1.0
    # A run that is all rise has no fall to be in, whatever rounding says about its last step.
    return False, min((here - peak) / (end - peak), 1.0) if end > peak else 0.0


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to ``factor`` times its ``peak_lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def set_first_beta(optimizers: Iterable[torch.optim.Optimizer], beta: float) -> None:
    """Set the first coefficient of every AdamW group; Muon's momentum is not an average of the same kind and stays."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                group["betas"] = (beta, group["betas"][1])


def set_muon_momentum(optimizers: Iterable[torch.optim.Optimizer], momentum: float) -> None:
    """Set the coefficient of Muon's running average of the gradient."""
    for optimizer in optimizers:
        if isinstance(optimizer, BatchedMuon):
            for group in optimizer.param_groups:
                group["momentum"] = momentum


@torch.no_grad()
def clip_and_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale gradients so that their global norm is at most ``max_norm``; 0 only measures.

    Returns:
        The norm before clipping. If it is not finite the gradients are left as they are, for the caller to skip.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm) and 0 < max_norm < norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
