"""Checks of the R-HRM training recipe: the one-cycle schedule, and updates of the whole model.

What the cases do not say is fixed by the recipe they name: OneCycleLR's divisors where a case leaves them out, and
AdamW's numbers, which a case states in words.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ouroboros.config import OptimSpec
from ouroboros.optim import (
    build_optimizers,
    clip_and_norm,
    first_beta,
    learning_rate,
    set_first_beta,
    set_learning_rate,
)

DIVISORS = {"div_factor": 25.0, "final_div_factor": 1e4}
MOMENTUM = "beta1 between 0.95 and 0.85"


def _spec(values: dict[str, Any], **more: Any) -> OptimSpec:
    """The one-cycle schedule of a case, in our names: both ends are shares of the peak."""
    start = values.get("div_factor", DIVISORS["div_factor"])
    end = values.get("final_div_factor", DIVISORS["final_div_factor"])
    high, low = _numbers(values.get("momentum_cycled", MOMENTUM), "between {} and {}")
    return OptimSpec(
        matrix_optimizer="adamw",
        lr=values["max_lr"],
        schedule="one_cycle",
        warmup_fraction=values["pct_start"],
        decay_fraction=0.0,
        start_lr=1 / start,
        final_lr=1 / start / end,
        momentum_cycle=(low, high),
        **more,
    )


def _numbers(text: str, pattern: str) -> list[float]:
    """The numbers that stand for ``{}`` of ``pattern`` in ``text``."""
    found = re.search(pattern.replace("{}", r"(\d+(?:\.\d+)?(?:e-?\d+)?)"), text)
    assert found, f"{text!r} does not say {pattern!r}"
    return [float(number) for number in found.groups()]


def schedule(case: dict[str, Any], path: Path, work: Path) -> None:
    """Rate and first coefficient in force at every update."""
    for run in case["runs"]:
        spec, steps = _spec(run), run["total_steps"]
        for step, (rate, beta) in enumerate(run["table"]):
            middle = (step + 0.5) / steps
            assert learning_rate(middle, spec, steps) * spec.lr == pytest.approx(rate, rel=1e-9, abs=1e-15), step
            assert first_beta(middle, spec, steps) == pytest.approx(beta, rel=1e-12), step


def training_steps(case: dict[str, Any], path: Path, work: Path) -> None:
    """Losses, norms before clipping, rates and end parameters of a few updates."""
    tensors = load_file(path.with_suffix(".safetensors"))
    recipe, tolerance = case["recipe"], case["tolerance"]
    words = recipe["optimizer"]
    (eps,), (beta2,) = _numbers(words, "eps {}"), _numbers(words, "beta2 {}")
    (decay,) = _numbers(words, "weight decay {} on every parameter")
    spec = _spec(recipe, weight_decay=decay, decay="all", eps=eps, betas=(0.9, beta2), clip_norm=recipe["clip"])
    model = _build(case["config"], _under("start.", tensors)).train()
    optimizers = build_optimizers(model, spec)
    update = 0
    for entry in case["log"]:
        ids = tensors["in.batches"][entry["micro"]].long()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert loss.item() == pytest.approx(entry["loss"], abs=tolerance["loss_atol"]), entry
        (loss / recipe["accumulation"]).backward()
        if "update" not in entry:
            continue
        middle, steps = (update + 0.5) / recipe["total_steps"], recipe["total_steps"]
        set_learning_rate(optimizers, learning_rate(middle, spec, steps))
        set_first_beta(optimizers, first_beta(middle, spec, steps))
        group = optimizers[0].param_groups[0]
        assert group["lr"] == pytest.approx(entry["lr"], rel=1e-9, abs=1e-15), entry
        assert group["betas"][0] == pytest.approx(entry["beta1"], rel=1e-9), entry
        norm = clip_and_norm(model.parameters(), spec.clip_norm)
        assert norm == pytest.approx(entry["grad_norm"], abs=10 * tolerance["loss_atol"]), entry
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        update += 1
        assert entry["update"] == update
    found = dict(model.named_parameters())
    for name, wanted in _build(case["config"], _under("end.", tensors)).named_parameters():
        torch.testing.assert_close(
            found[name], wanted, atol=tolerance["parameter_atol"], rtol=0, msg=lambda m, n=name: f"{path}: {n}: {m}"
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _build(config: dict[str, Any], parameters: dict[str, Tensor]) -> Any:
    """The model of a case, from its neighbour: test files are not a package."""
    where = Path(__file__).with_name("rhrm_model.py")
    found = importlib.util.spec_from_file_location("rhrm_model", where)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.build(config, parameters)


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "learning rate and first Adam coefficient in force at update i (0-based)": schedule,
    "a few optimiser updates by the original recipe, dropout absent": training_steps,
}
