"""Checks that what is counted equals what is measured, and that every parameter is trained that should be.

Each check takes a :class:`~ouroboros.eval.equivalence.Subject` and returns a sentence, or raises
:class:`~ouroboros.eval.equivalence.Mismatch`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Set

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ouroboros.accounting import cost, visit_flops
from ouroboros.config import OptimSpec
from ouroboros.eval.equivalence import Mismatch, Subject, equal, logits_of
from ouroboros.model.cache import cache_bytes
from ouroboros.optim import build_optimizers, parameter_roles, untrained_parameters

NOISE = 0.05
"""Standard deviation of the noise that moves parts away from a neutral start."""


@torch.no_grad()
def perturb(model: nn.Module, noise: float = NOISE) -> None:
    """Add normal noise to every parameter, so that parts that start neutral do something."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)


def check_gradients(subject: Subject) -> str:
    """Every parameter gets a finite gradient, and one that is not all zero (after noise, if it started neutral).

    Those that are untrained by specification get none at all, even if they ask for one.
    """
    model = copy.deepcopy(subject.model).train().requires_grad_(True)
    untrained = untrained_parameters(model)
    zero = _zero_gradients(model, subject, untrained)
    if zero:
        perturb(model)
        zero = _zero_gradients(model, subject, untrained)
    if zero:
        raise Mismatch(f"gradient is all zero: {', '.join(zero[:5])}")
    trained = sum(1 for _ in model.parameters()) - len(untrained)
    without = f"; {len(untrained)} untrained by specification, without one" if untrained else ""
    return f"{trained} parameters: gradients finite and not all zero{without}"


def _zero_gradients(model: nn.Module, subject: Subject, untrained: Set[str] = frozenset()) -> list[str]:
    """Names of parameters whose gradient of the loss is zero throughout; ``untrained`` ones have none.

    Every position is scored, and a single token gets another one behind it: attention to one position, or to equal
    ones, has no gradient of queries and keys, and whether rounding leaves some depends on the processor.
    """
    model.zero_grad(set_to_none=True)
    ids = subject.ids
    if ids.shape[1] == 1:
        ids = torch.cat((ids, (ids + 1) % subject.spec.vocab_size), dim=1)
    model(ids, labels=ids, shift_labels=ids.roll(-1, dims=1), use_cache=False).loss.backward()
    zero = []
    for name, parameter in model.named_parameters():
        if name in untrained:
            if parameter.grad is not None:
                raise Mismatch(f"declared untrained, but has a gradient: {name}")
        elif parameter.grad is None:
            raise Mismatch(f"no gradient: {name}")
        elif not torch.isfinite(parameter.grad).all():
            raise Mismatch(f"gradient is not finite: {name}")
        elif not parameter.grad.any():
            zero.append(name)
    return zero


def check_optimizer_groups(subject: Subject) -> str:
    """Every parameter has one role and is in exactly one optimiser group; those untrained by specification in none."""
    model = copy.deepcopy(subject.model).requires_grad_(True)
    roles, untrained = parameter_roles(model), untrained_parameters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    equal(sorted(roles), sorted(names.values()), "parameters with a role")
    for matrix_optimizer in ("muon", "adamw"):
        optimizers = build_optimizers(model, OptimSpec(matrix_optimizer=matrix_optimizer))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        counts = Counter(parameter for group in groups for parameter in group["params"])
        trained = {p: name for p, name in names.items() if name not in untrained}
        wrong = [f"{name} in {counts[p]} groups" for p, name in trained.items() if counts[p] != 1]
        equal(wrong, [], f"parameters not in exactly one group ({matrix_optimizer})")
        equal(len(counts), len(trained), f"parameters in groups ({matrix_optimizer})")
    found = Counter(role for name, role in roles.items() if name not in untrained)
    listed = ", ".join(f"{count} {role}" for role, count in sorted(found.items()))
    return f"each in exactly one group: {listed}" + (f"; {len(untrained)} untrained in none" if untrained else "")


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
        # their keys and values are built once more for the text; where a state is carried, they leave one.
        run, width = view.schedule, subject.spec.hidden_size
        mixers = [subject.spec.blocks[visit.block].mixer for visit in run.visits]
        expected = length * per_token
        if registers:
            again, read = (sum(each) for each in zip(*(mixer.prefix_flops(width) for mixer in mixers), strict=True))
            expected += registers * (visit_flops(subject.spec, run, registers) + again) + length * read
        place = "FLOPs" if loops is None else f"FLOPs, loops {loops}"
        found = counter.get_total_flops()
        # Work on some of the tokens alone is counted in whole operations for each.
        rounded = any(mixer.flops_are_rounded for mixer in mixers)
        if not (rounded and abs(found - expected) < length * run.num_visits):
            equal(found, expected, place)
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
