"""Checks that what is counted equals what is measured, and that every parameter is trained that should be.

Each check takes a :class:`~ouroboros.eval.subject.Subject`; see :mod:`ouroboros.eval.finding`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Set

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ouroboros.accounting import cost, text_flops, visit_flops
from ouroboros.config import ModelSpec, OptimSpec
from ouroboros.eval.finding import Mismatch, equal, require
from ouroboros.eval.subject import Subject, logits_of, perturb
from ouroboros.model.cache import cache_bytes
from ouroboros.model.executor import observe
from ouroboros.optim import build_optimizers, parameter_roles, untrained_parameters
from ouroboros.schedule import Schedule


def check_gradients(subject: Subject) -> str:
    """Every parameter gets a finite gradient, and one that is not all zero (after noise, if it started neutral).

    Those that are untrained by specification get none at all, even if they ask for one.
    """
    model = copy.deepcopy(subject.model).train().requires_grad_(True)
    untrained = untrained_parameters(model)
    if _zero_gradients(model, subject, untrained):
        perturb(model)
        zero = _zero_gradients(model, subject, untrained)
        require(not zero, f"gradient is all zero: {', '.join(zero[:5])}")
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
    if subject.length == 1:
        ids = torch.cat((ids, (ids + 1) % subject.spec.vocab_size), dim=1)
    model(ids, targets=ids.roll(-1, dims=1), use_cache=False).loss.backward()
    zero = []
    for name, parameter in model.named_parameters():
        if name in untrained:
            require(parameter.grad is None, f"declared untrained, but has a gradient: {name}")
        elif parameter.grad is None:
            raise Mismatch(f"no gradient: {name}")
        else:
            require(bool(torch.isfinite(parameter.grad).all()), f"gradient is not finite: {name}")
            if not parameter.grad.any():
                zero.append(name)
    return zero


def check_optimizer_groups(subject: Subject) -> str:
    """Every parameter has one role and is in exactly one optimiser group; those untrained by specification in none."""
    model = copy.deepcopy(subject.model).requires_grad_(True)
    roles, untrained = parameter_roles(model), untrained_parameters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    equal(sorted(roles), sorted(names.values()), "parameters with a role")
    trained = {p: name for p, name in names.items() if name not in untrained}
    for matrix_optimizer in ("muon", "adamw"):
        optimizers = build_optimizers(model, OptimSpec(matrix_optimizer=matrix_optimizer))
        counts = Counter(p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
        wrong = [f"{name} in {counts[p]} groups" for p, name in trained.items() if counts[p] != 1]
        equal(wrong, [], f"parameters not in exactly one group ({matrix_optimizer})")
        equal(len(counts), len(trained), f"parameters in groups ({matrix_optimizer})")
    found = Counter(roles[name] for name in trained.values())
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

    shown = []
    for loops, (place, view) in zip(subject.views, subject.placed_views(), strict=True):
        counted = copy.deepcopy(view).requires_grad_(False)  # the counter's hooks fail on parameters passed as inputs
        # The fused kernels of some processors are not in the counter's table; plain products are.
        # Whoever watches is shown all loops, also those that positions which have stopped would do without.
        with observe(counted), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits_of(counted, subject.ids[:1])
        per_token, expected, unsure = _operations(subject.spec, view.schedule, loops, subject.length)
        found = counter.get_total_flops()
        if found != expected and abs(found - expected) >= unsure:
            equal(found, expected, f"FLOPs{place}")
        shown.append(_shown(per_token, place))
    return f"per token at context {subject.length}: {', '.join(shown)}"


def _operations(spec: ModelSpec, run: Schedule, loops: int | None, length: int) -> tuple[int, int, int]:
    """What accounting says of a pass over ``length`` tokens: operations of each, of the pass, and their uncertainty.

    Plain products compute all T x T scores, hence a context of T. Registers run by themselves: every visit, attending
    to each other, without the head. Where latents are kept, their keys and values are built once more for the text;
    where a state is carried, they leave one. Work on some of the tokens alone is counted in whole operations for each.
    What is done once for a text is not among the operations of its tokens.
    """
    per_token = cost(spec, context=length, loops=loops).flops_per_token
    once, width = text_flops(spec, run), spec.hidden_size
    total = length * per_token + once
    mixers = [spec.blocks[visit.block].mixer for visit in run.visits]
    if spec.registers:
        again, read = (sum(each) for each in zip(*(mixer.prefix_flops(width) for mixer in mixers), strict=True))
        total += spec.registers * (visit_flops(spec, run, spec.registers) + again) + length * read + once
    return per_token, total, length * run.num_visits if any(mixer.flops_are_rounded for mixer in mixers) else 0


def check_cache_bytes(subject: Subject) -> str:
    """A cache holds, and grows with each token by, what the accounting says, at every loop count."""
    batch, length = subject.ids.shape
    longer = subject.ids.repeat(1, 4)[:, : length + 3]
    shown = []
    for loops, (place, view) in zip(subject.views, subject.placed_views(), strict=True):
        with torch.no_grad():
            now, then = (cache_bytes(view(ids, use_cache=True).past_key_values) for ids in (subject.ids, longer))
        expected = cost(subject.spec, loops=loops)
        per_token = expected.cache_bytes_per_token()
        equal(then - now, batch * 3 * per_token, f"bytes of 3 more tokens of {batch} sequences{place}")
        held = batch * (length * per_token + expected.state_bytes())
        equal(now, held, f"bytes of {batch} sequences of {length} tokens{place}")
        shown.append(_shown(per_token, place))
    return f"bytes per token in float32: {', '.join(shown)}"


def _shown(number: int, place: str) -> str:
    """A number at a loop count, for people."""
    return f"{number:,}" + (f" ({place.removeprefix(', ')})" if place else "")
