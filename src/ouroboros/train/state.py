"""The state of optimisers as tensors and JSON, exact to the bit and without pickle.

torch's own ``state_dict`` numbers the parameters; here they have their names in the model, as in the weights beside
them. ``torch.distributed.checkpoint.state_dict`` names them too, but gives parameters that have no state yet a fresh
one, and overwrites every setting, so that a rate or a decay that was changed on resume would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.errors import check

Names = Mapping[Any, str]
"""Parameter to name, as ``{p: name for name, p in model.named_parameters()}``."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once, and the buffers that belong to a checkpoint; by name, not copied."""
    parameters, kept = dict(model.named_parameters()), model.state_dict().keys()
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def copy_tensors(present: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy ``saved`` into the tensors that are ``present``, all of them or none.

    Raises:
        OuroborosError: names or shapes differ; begins with ``what``.
    """
    missing, unexpected = sorted(present.keys() - saved.keys()), sorted(saved.keys() - present.keys())
    check(not missing and not unexpected, f"{what}: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, tensor in present.items():
        shape, expected = tuple(saved[name].shape), tuple(tensor.shape)
        check(shape == expected, f"{what}: {name} has shape {shape}, the model has {expected}")
    for name, tensor in present.items():
        tensor.copy_(divided(saved[name], tensor))


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """``tensors``, those that are divided among processes whole and in the memory of the CPU, one after another. Every
    process has to call this with the same ones; without ``keep`` it only gives its parts, and gets nothing."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor().cpu() if _is_divided(tensor) else tensor  # pyrefly: ignore
        if keep:
            found[name] = whole
    return found


def divided(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all have, where ``like`` is divided among them; else the tensor itself."""
    if not _is_divided(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # pyrefly: ignore
    everywhere = DTensor.from_local(whole.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # pyrefly: ignore


def _is_divided(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, whose module takes a second to import."""
    return hasattr(tensor, "device_mesh")


def pack_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: Names
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The whole state of optimisers that share no parameter.

    Returns:
        Tensors (``NAME/KEY``, not copied), and for each optimiser a JSON document: its class, its groups with their
        settings and the names of their parameters, and which state each parameter has.

    Raises:
        OuroborosError: a parameter without a name, or state that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    documents = []
    for optimizer in optimizers:
        members = _members(optimizer, names)
        state: dict[str, dict[str, None]] = {}
        for parameter, values in optimizer.state.items():
            name = names[parameter]
            for key, value in values.items():
                check(isinstance(value, Tensor), f"optimiser state {key!r} of {name} is no tensor and cannot be saved")
                tensors[f"{name}/{key}"] = value.detach()
            state[name] = dict.fromkeys(values)
        groups = [
            {"params": group_members, "settings": {key: value for key, value in group.items() if key != "params"}}
            for group_members, group in zip(members, optimizer.param_groups, strict=True)
        ]
        documents.append({"class": type(optimizer).__name__, "groups": groups, "state": state})
    return tensors, documents


def unpack_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Names,
    tensors: Mapping[str, Tensor],
    documents: Sequence[Mapping[str, Any]],
) -> None:
    """Restore what :func:`pack_optimizers` gave into freshly built optimisers of the same parameters.

    The present rate ``lr`` is restored; other settings stay as built. Tensors are copied.

    Raises:
        OuroborosError: other classes or parameters, a tensor that is missing, of the wrong shape or of nothing. The
            optimisers are then unchanged.
    """
    saved, present = [d["class"] for d in documents], [type(o).__name__ for o in optimizers]
    check(saved == present, f"optimiser state is of {', '.join(saved)}; the run uses {', '.join(present)}")
    used = {f"{name}/{key}" for d in documents for name, keys in d["state"].items() for key in keys}
    unexpected, missing = sorted(tensors.keys() - used), sorted(used - tensors.keys())
    check(not unexpected, f"optimiser state has tensors that belong to nothing: {unexpected}")
    check(not missing, f"optimiser state {', '.join(missing)} is missing")
    pairs = list(zip(optimizers, documents, strict=True))
    states = [_numbered(optimizer, names, tensors, document) for optimizer, document in pairs]
    for (optimizer, document), state in zip(pairs, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for group, saved_group in zip(optimizer.param_groups, document["groups"], strict=True):
            group["lr"] = saved_group["settings"]["lr"]


def _numbered(
    optimizer: torch.optim.Optimizer, names: Names, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> dict[int, dict[str, Tensor]]:
    """The saved state by the number of the parameter, as torch has it; checked against the optimiser."""
    kind, members = type(optimizer).__name__, _members(optimizer, names)
    saved = [group["params"] for group in document["groups"]]
    count, saved_count = len(members), len(saved)
    check(count == saved_count, f"optimiser state of {kind} has {saved_count} parameter groups, the run has {count}")
    for here, there in zip(members, saved, strict=True):
        changed = sorted(set(here) ^ set(there))
        check(not changed, f"optimiser state of {kind} has other parameters: {changed}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        name = names[parameter]
        if name in document["state"]:
            found = {key: tensors[f"{name}/{key}"].clone() for key in document["state"][name]}
            for key, tensor in found.items():
                shapes = f"{tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
                fits = not tensor.ndim or tensor.shape == parameter.shape
                check(fits, f"optimiser state {name}/{key} has shape {shapes}")
            state[index] = {key: divided(tensor, parameter) if tensor.ndim else tensor for key, tensor in found.items()}
    return state


def _members(optimizer: torch.optim.Optimizer, names: Names) -> list[list[str]]:
    """The names of the parameters of each group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shape = tuple(parameter.shape)
            check(parameter in names, f"an optimised parameter of shape {shape} has no name in the model")
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
