"""Optimisers by parameter role.

Every parameter has one role: ``matrix`` (Muon; decayed), ``embedding`` (AdamW: tables and the head), ``vector`` (AdamW:
norms, gains, biases, per-loop rows) or ``scalar`` (AdamW: single numbers that steer a part as a whole). A module class
with direct parameters that the rules cannot place, or that are scalars, declares ``PARAMETER_ROLES = {"attribute":
"role"}``. Parameters that a module never trains, by its specification, stand in its ``untrained``.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config import OptimSpec
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.optim.muon import BatchedMuon, faster_dtype, muon_coefficients

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
    return set(matching([name for name, _ in model.named_parameters()], spec.left_out, "optim.left_out"))


def leave_out(model: nn.Module, spec: OptimSpec, factors: Factors | None = None) -> None:
    """Give the parameters that ``spec.left_out`` names no gradient, which takes time and nothing needs; but those that
    are made of ``factors``."""
    for name in left_out_parameters(model, spec).difference(factors or ()):
        model.get_parameter(name).requires_grad_(False)


def matching(names: Sequence[str], patterns: Iterable[str], option: str) -> list[str]:
    """Those of ``names`` that match any of ``patterns``, in their order.

    Raises:
        OuroborosError: a pattern of ``option`` that matches none.
    """
    for pattern in patterns:
        hint = f"a name is, for example, {names[0]}" if names else "there is none"
        check(
            any(fnmatch.fnmatchcase(name, pattern) for name in names),
            f"{option}: {pattern!r} is the name of no such parameter; {hint}",
        )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def chosen_matrices(model: nn.Module, patterns: Sequence[str], option: str) -> list[str]:
    """The names of matrices and tables that match any of ``patterns``, in the model's order; without patterns those of
    every matrix that is no table.

    Raises:
        OuroborosError: a pattern of ``option`` that no two-dimensional parameter has, or no matrix at all.
    """
    if patterns:
        names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
        return matching(names, patterns, f"{option}.where")
    matrices = [name for name, role in parameter_roles(model).items() if role == "matrix"]
    check(bool(matrices), f"{option}: the model has no matrix")
    return matrices


Factors = Mapping[str, Sequence[nn.Parameter]]
"""Names of parameters that are computed from others, and those others, which are trained in their place."""


def build_optimizers(
    model: nn.Module, spec: OptimSpec, *, muon_dtype: torch.dtype | None = None, factors: Factors | None = None
) -> list[torch.optim.Optimizer]:
    """Muon for trainable matrices and AdamW for the rest, or AdamW for all with ``matrix_optimizer="adamw"``.

    Every trainable parameter that ``spec.left_out`` does not name is in exactly one group; those that it names require
    no gradient afterwards. Groups carry ``role`` and ``peak_lr``; :func:`set_learning_rate` scales the latter. Only
    matrices are decayed, or every group with ``decay="all"``.

    Args:
        model: parameters that do not require a gradient or are untrained by specification are left out.
        spec: rates, decay, momentum.
        muon_dtype: in which Muon orthogonalises; None takes what ``spec.muon_precision`` says, see
            :func:`choose_muon_dtype`.
        factors: are trained in the place of the parameters they make, in the same groups, also where
            ``spec.left_out`` names those.

    Raises:
        OuroborosError: no trainable parameter, or one without a role (see :func:`parameter_roles`).
    """
    trainable = _trainable(model, spec, factors)
    leave_out(model, spec, factors)
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
        groups[role]["params"] += trainable.get(name, ())
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


def _trainable(model: nn.Module, spec: OptimSpec, factors: Factors | None) -> dict[str, Sequence[nn.Parameter]]:
    """The parameters that are trained, by the name in the model."""
    others = untrained_parameters(model) | left_out_parameters(model, spec)
    own = {name: [p] for name, p in model.named_parameters() if p.requires_grad and name not in others}
    return own | dict(factors or {})


def choose_muon_dtype(model: nn.Module, spec: OptimSpec, factors: Factors | None = None) -> torch.dtype:
    """The precision in which Muon orthogonalises the trainable matrices of ``model``, as ``spec.muon_precision`` says.

    ``auto`` times iterations on matrices of the shape that has most numbers, on the model's device, and takes bfloat16
    where it is at least 1.3 times as fast as float32: a processor that emulates bfloat16 is many times slower. Shapes
    below 128 are timed at 128, where products and not the calls decide, so that two runs choose alike.
    """
    if spec.muon_precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.muon_precision]
    roles, trainable = parameter_roles(model), _trainable(model, spec, factors)
    matrices = [p for name, held in trainable.items() if roles[name] == "matrix" for p in held]
    if spec.matrix_optimizer != "muon" or not matrices or matrices[0].device.type == "meta":
        return torch.float32
    numbers: Counter[tuple[int, int]] = Counter()
    for p in matrices:
        numbers[(min(p.shape), max(p.shape))] += p.numel()
    rows, columns = max(numbers, key=lambda shape: (numbers[shape], shape))
    return faster_dtype((max(rows, 128), max(columns, 128)), matrices[0].device)


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
