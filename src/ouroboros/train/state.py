"""The state of optimisers as tensors and JSON, exact to the bit and without pickle."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ouroboros.errors import OuroborosError, check

logger = logging.getLogger(__name__)

Names = Mapping[Any, str]
"""Parameter to name, as ``{p: name for name, p in model.named_parameters()}``."""


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state of ``optimizer``.

    Returns:
        Tensors (``NAME/KEY``, not copied) and a JSON document (class, groups with their settings and parameter names,
        state that is not a tensor).

    Raises:
        OuroborosError: a parameter without a name, or a setting or state that is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    groups, state = [], {}
    for group in optimizer.param_groups:
        members = [_name(parameter, names) for parameter in group["params"]]
        groups.append({"params": members, "settings": _settings(group)})
        for parameter, name in zip(group["params"], members, strict=True):
            if parameter not in optimizer.state:
                continue
            state[name] = {}
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach()
                    state[name][key] = None
                else:
                    state[name][key] = [_plain(value, f"optimiser state {key!r} of {name}")]
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Names, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> list[str]:
    """Restore what :func:`pack_optimizer` gave into a freshly built optimiser of the same parameters.

    The present rate ``lr`` is restored; other settings stay as built.

    Returns:
        One line for each setting that differs from the saved one: empty means that the run goes on exactly.

    Raises:
        OuroborosError: another class, other parameters, a tensor missing or of the wrong shape. The optimiser is then
            unchanged.
    """
    kind = type(optimizer).__name__
    check(document["class"] == kind, f"optimiser state is of {document['class']}, the run uses {kind}")
    count, saved_count = len(optimizer.param_groups), len(document["groups"])
    check(count == saved_count, f"optimiser state of {kind} has {saved_count} parameter groups, the run has {count}")
    restored: dict[Tensor, dict[str, Any]] = {}
    differences = []
    for group, saved in zip(optimizer.param_groups, document["groups"], strict=True):
        members = [_name(parameter, names) for parameter in group["params"]]
        changed = sorted(set(members) ^ set(saved["params"]))
        check(not changed, f"optimiser state of {kind} has other parameters: {changed}")
        differences += _differences(kind, _settings(group), saved["settings"])
        for parameter, name in zip(group["params"], members, strict=True):
            if name in document["state"]:
                restored[parameter] = _restore(parameter, name, document["state"][name], tensors, group)
    optimizer.state.clear()
    optimizer.state.update(restored)
    for group, saved in zip(optimizer.param_groups, document["groups"], strict=True):
        group["lr"] = saved["settings"]["lr"]
    return differences


def pack_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: Names
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """:func:`pack_optimizer` of several optimisers of different parameters; one set of tensors, one document each."""
    packed = [pack_optimizer(optimizer, names) for optimizer in optimizers]
    return {key: tensor for tensors, _ in packed for key, tensor in tensors.items()}, [
        document for _, document in packed
    ]


def unpack_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Names,
    tensors: Mapping[str, Tensor],
    documents: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Restore :func:`pack_optimizers`; see :func:`unpack_optimizer` for the result and the errors."""
    saved, present = [d["class"] for d in documents], [type(o).__name__ for o in optimizers]
    check(saved == present, f"optimiser state is of {', '.join(saved)}; the run uses {', '.join(present)}")
    used = {f"{name}/{key}" for d in documents for name, state in d["state"].items() for key in state}
    unexpected = sorted(tensors.keys() - used)
    check(not unexpected, f"optimiser state has tensors that belong to nothing: {unexpected}")
    pairs = zip(optimizers, documents, strict=True)
    return [line for optimizer, document in pairs for line in unpack_optimizer(optimizer, names, tensors, document)]


def _name(parameter: Tensor, names: Names) -> str:
    if parameter not in names:
        raise OuroborosError(f"an optimised parameter of shape {tuple(parameter.shape)} has no name in the model")
    return names[parameter]


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON reads it back; tuples become lists."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise OuroborosError(f"{where} is a {type(value).__name__}, which cannot be saved")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value, f"optimiser setting {key!r}") for key, value in group.items() if key != "params"}


def _differences(kind: str, present: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    keys = sorted((present.keys() | saved.keys()) - {"lr"})
    role = present.get("role", "parameters")
    return [
        f"{kind} ({role}): {key} was {saved.get(key)}, now {present.get(key)}"
        for key in keys
        if present.get(key) != saved.get(key)
    ]


def _restore(
    parameter: Tensor, name: str, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of one parameter; tensors are copied, dtypes kept."""
    state: dict[str, Any] = {}
    for key, boxed in saved.items():
        if boxed is not None:
            state[key] = boxed[0]
            continue
        tensor = tensors.get(f"{name}/{key}")
        if tensor is None:
            raise OuroborosError(f"optimiser state {name}/{key} is missing")
        if tensor.ndim and tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
            raise OuroborosError(f"optimiser state {name}/{key} has shape {shapes}")
        # torch keeps step counters on the CPU unless the fused or captured kernels need them next to the parameter.
        local = key != "step" or group.get("fused") or group.get("capturable")
        state[key] = tensor.detach().to(parameter.device if local else "cpu", copy=True)
    return state
