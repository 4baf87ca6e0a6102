"""Checks of the crawler's training: Muon, its orthogonalisation, the schedule of the rate.

A case holds several groups of tensors, each with a check of its own, here or in a file beside this one.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.config import OptimSpec
from ouroboros.optim import BatchedMuon, learning_rate, orthogonalize

Tensors = dict[str, Tensor]


def _tolerances(case: dict[str, Any]) -> tuple[float, float]:
    """What parameters after a step of Muon, and orthogonalised matrices, may differ by; the case says it in words."""
    found = re.search(r"atol (\S+) on parameters, (\S+) on the polar factor", case["tolerance"])
    assert found, f"{case['tolerance']!r} does not say how much parameters and polar factor may differ"
    return float(found[1]), float(found[2])


def _coefficients(case: dict[str, Any]) -> tuple[tuple[float, float, float], ...]:
    a, b, c = case["muon"]["coefficients"]
    return ((a, b, c),) * case["muon"]["ns_steps"]


def _dtype(case: dict[str, Any]) -> torch.dtype:
    return getattr(torch, case["muon"]["compute"])


def muon(case: dict[str, Any], tensors: Tensors) -> None:
    """Parameters after each of a few steps, all in one optimiser."""
    settings, (atol, _) = case["muon"], _tolerances(case)
    assert settings["nesterov"]
    starts = {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.endswith(".init")}
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in starts.items()}
    optimizer = BatchedMuon(
        parameters.values(),
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        coefficients=_coefficients(case),
        original=True,
        dtype=_dtype(case),
    )
    steps = 1 + max(int(name.rpartition(".after")[2]) for name in tensors if ".after" in name)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = tensors[f"muon.{name}.grad{step}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), tensors[f"muon.{name}.after{step}"], atol=atol, rtol=0)


def ns(case: dict[str, Any], tensors: Tensors) -> None:
    """One matrix orthogonalised."""
    x, wanted = tensors["ns.in"], tensors["ns.out"]
    tall = x.size(0) > x.size(1)
    wide = (x.mT if tall else x)[None].to(_dtype(case)).contiguous()
    found = orthogonalize(wide, _coefficients(case), 1e-7, fused=False)[0]
    torch.testing.assert_close((found.mT if tall else found).float(), wanted, atol=_tolerances(case)[1], rtol=0)


def schedule(case: dict[str, Any]) -> None:
    """The rate at every step of the table: by steps where there is no clock to end the run, else by the clock."""
    for row in case["schedule"]:
        spec = OptimSpec(warmup_fraction=0.0, decay_steps=row["warmdown"])
        progress, steps = row["step"] / row["iterations"], row["iterations"]
        if row["wallclock_s"]:
            progress = row["elapsed_ms"] / 1000 / row["wallclock_s"]
            steps = row["step"] / progress if progress else math.inf
        assert learning_rate(progress, spec, steps) == pytest.approx(row["lr_multiplier"], rel=1e-9, abs=1e-12), row


def groups_of(name: str) -> dict[str, Callable[[dict[str, Any], Tensors], None]]:
    """``GROUPS`` of the file ``name`` beside this one."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GROUPS


GROUPS = {"muon": muon, "ns": ns, **groups_of("crawler_stem"), **groups_of("crawler_data")}
"""The check of each group of tensors, by the beginning of their names; it is given all tensors of the case."""


def training(case: dict[str, Any], path: Path, work: Path) -> None:
    """Every group of a case."""
    schedule(case)
    tensors = load_file(path.with_suffix(".safetensors"))
    groups = {re.split(r"[\d.]", name)[0] for name in tensors}
    assert groups <= GROUPS.keys(), f"{path.name}: no check of {', '.join(sorted(groups - GROUPS.keys()))}"
    for group in sorted(groups):
        GROUPS[group](case, tensors)


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {"training": training}
