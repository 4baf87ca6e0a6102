"""What training asks of a model's parts.

core: ask the spec. Each of these functions asks for one part by name until specifications and modules answer for
themselves: ``warnings`` and the cost of a cut gradient in the specification, ``telemetry`` as a method of the module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ouroboros.config import ModelSpec


def warnings(spec: ModelSpec) -> list[str]:
    """Sentences on settings of ``spec`` that are allowed and that nobody wants.

    core: ask the spec.
    """
    from ouroboros.eval.osam import idle_buckets

    found = [idle] if (idle := idle_buckets(spec)) is not None else []
    if spec.residual == "delta" and spec.delta.frozen_gate:
        found.append(
            f"model.delta.beta_init {spec.delta.beta_init:g} starts the gates where their derivative is almost 0, so"
            " they do not learn; for a start near the identity take 0.01 to 0.1"
        )
    return found


def injects_input(spec: ModelSpec) -> bool:
    """Whether every loop is given the prelude's output again, so that a gradient cut between loops still reaches it.

    core: ask the loop parts.
    """
    return spec.loop.inject != "none"


def part_records(model: Any, batch: np.ndarray) -> dict[str, Any]:
    """What the parts of ``model`` tell of themselves on ``batch`` (B, T + 1), for the telemetry record.

    core: the modules with a method ``telemetry``, on visits that ``observe`` reports.
    """
    from ouroboros.eval.osam import ROWS, reading_losses, telemetry

    if model.model.spec.mixer.kind != "osam":
        return {}
    ids = torch.from_numpy(batch[:ROWS, :-1]).to(next(model.parameters()).device)
    found: dict[str, Any] = {"memory": [record.to_dict() for record in telemetry(model, ids)]}
    losses = reading_losses(model, batch)
    return found | ({"loss_by_reading": losses} if losses else {})
