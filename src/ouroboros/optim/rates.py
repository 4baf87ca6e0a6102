"""Learning-rate schedules as pure functions of the run's progress."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ouroboros.config import OptimSpec


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
