"""Checks that what is counted equals what is measured, and that every parameter is trained.

Each check takes a :class:`~ouroboros.eval.equivalence.Subject` and returns a sentence, or raises
:class:`~ouroboros.eval.equivalence.Mismatch`.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ouroboros.accounting import block_flops, cost, loop_flops, rebuild_flops
from ouroboros.config import OptimSpec
from ouroboros.eval.equivalence import Mismatch, Subject, equal, logits_of
from ouroboros.model.cache import cache_bytes
from ouroboros.optim import build_optimizers, parameter_roles

NOISE = 0.05
"""Standard deviation of the noise that moves parts away from a neutral start."""


@torch.no_grad()
def perturb(model: nn.Module, noise: float = NOISE) -> None:
    """Add normal noise to every parameter, so that parts that start neutral do something."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)


def check_gradients(subject: Subject) -> str:
    """Every parameter gets a finite gradient, and one that is not all zero (after noise, if it started neutral)."""
    model = copy.deepcopy(subject.model).train().requires_grad_(True)
    zero = _zero_gradients(model, subject)
    if zero:
        perturb(model)
        zero = _zero_gradients(model, subject)
    if zero:
        raise Mismatch(f"gradient is all zero: {', '.join(zero[:5])}")
    return f"{sum(1 for _ in model.parameters())} parameters: gradients finite and not all zero"


def _zero_gradients(model: nn.Module, subject: Subject) -> list[str]:
    """Names of parameters whose gradient of the loss is zero throughout."""
    model.zero_grad(set_to_none=True)
    ids = subject.ids if subject.ids.shape[1] > 1 else subject.ids.repeat(1, 2)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise Mismatch(f"no gradient: {name}")
        if not torch.isfinite(parameter.grad).all():
            raise Mismatch(f"gradient is not finite: {name}")
    return [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]


def check_optimizer_groups(subject: Subject) -> str:
    """Every parameter has one role and is in exactly one optimiser group."""
    model = copy.deepcopy(subject.model).requires_grad_(True)
    roles = parameter_roles(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    equal(sorted(roles), sorted(names.values()), "parameters with a role")
    for matrix_optimizer in ("muon", "adamw"):
        optimizers = build_optimizers(model, OptimSpec(matrix_optimizer=matrix_optimizer))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        counts = Counter(parameter for group in groups for parameter in group["params"])
        wrong = [f"{name} in {counts[p]} groups" for p, name in names.items() if counts[p] != 1]
        equal(wrong, [], f"parameters not in exactly one group ({matrix_optimizer})")
        equal(len(counts), len(names), f"parameters in groups ({matrix_optimizer})")
    listed = ", ".join(f"{count} {role}" for role, count in sorted(Counter(roles.values()).items()))
    return f"each in exactly one group: {listed}"


def check_parameters(subject: Subject) -> str:
    """The number of stored parameters is the accounting's."""
    found = sum(parameter.numel() for parameter in subject.model.parameters())
    equal(found, cost(subject.spec).parameters, "parameters")
    return f"{found:,} parameters, as counted from the specification"


def check_flops(subject: Subject) -> str:
    """The arithmetic of one pass is the accounting's, at every loop count."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = subject.ids[:1]
    length, registers, shown = ids.shape[1], subject.spec.registers, []
    for loops, view in subject.views.items():
        counted = copy.deepcopy(view).requires_grad_(False)  # the counter's hooks fail on parameters passed as inputs
        # The fused kernels of some processors are not in the counter's table; plain products are. They compute all
        # T x T scores, hence context = T.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits_of(counted, ids)
        per_token = cost(subject.spec, context=length, loops=loops).flops_per_token
        # Registers run by themselves: every visit, attending to each other, without the head. Where latents are kept,
        # their keys and values are built once more for the text.
        run = view.schedule
        again = rebuild_flops(subject.spec.mixer, subject.spec.hidden_size)
        extra = run.num_visits * (block_flops(subject.spec, registers) + again) + loop_flops(subject.spec, run)
        place = "FLOPs" if loops is None else f"FLOPs, loops {loops}"
        equal(counter.get_total_flops(), length * per_token + registers * extra, place)
        shown.append(f"{per_token:,}" + ("" if loops is None else f" (loops {loops})"))
    return f"per token at context {length}: {', '.join(shown)}"


def check_cache_bytes(subject: Subject) -> str:
    """A cache holds, and grows with each token by, what the accounting says, at every loop count."""
    batch, length = subject.ids.shape
    shown = []
    for loops, view in subject.views.items():
        sizes = []
        with torch.no_grad():
            for tokens in (length, length + 3):
                ids = subject.ids.repeat(1, 4)[:, :tokens]
                sizes.append(cache_bytes(view(ids, use_cache=True).past_key_values))
        expected = cost(subject.spec, loops=loops)
        place = "" if loops is None else f", loops {loops}"
        per_token = expected.cache_bytes_per_token()
        equal(sizes[1] - sizes[0], batch * 3 * per_token, f"bytes of 3 more tokens of {batch} sequences{place}")
        held = batch * (length * per_token + expected.state_bytes())
        equal(sizes[0], held, f"bytes of {batch} sequences of {length} tokens{place}")
        shown.append(f"{per_token:,}" + ("" if loops is None else f" (loops {loops})"))
    return f"bytes per token in float32: {', '.join(shown)}"
