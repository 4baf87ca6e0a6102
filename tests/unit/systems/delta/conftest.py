"""A small model with delta residuals, as the report looks at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.config import FeedForwardSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.recipes import recipe
from ouroboros.systems.delta.measure import record
from ouroboros.systems.delta.report_charts import Look


@pytest.fixture(scope="session")
def delta_model() -> Callable[..., tuple[Any, Any, torch.Tensor]]:
    """Makes a tiny model with gates all over (0, 2), its recipe and 2 sequences of 12 tokens."""

    def make(layout: str = "1 (1)x2", **delta: Any) -> tuple[Any, Any, torch.Tensor]:
        made = recipe("gpt", "tiny")
        parts = {"ffn": FeedForwardSpec(intermediate_size=24), "residual": DeltaSpec(**delta)}
        made = dataclasses.replace(made, model=made.model.replace(layout=layout, hidden_size=16, **parts))
        torch.manual_seed(1)
        built = build(made).eval()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if ".gate." in name:
                    parameter.normal_(std=0.6)
        return built, made, torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))

    return make


@pytest.fixture(scope="session")
def look_of(delta_model: Callable[..., tuple[Any, Any, torch.Tensor]]) -> Callable[..., Look]:
    """Makes a model as ``delta_model`` does, and looks at it."""

    def look(*layout: str, **delta: Any) -> Look:
        model, _, ids = delta_model(*layout, **delta)
        return Look(schedule=model.schedule, records=record(model, ids))

    return look


@pytest.fixture(scope="session")
def look(look_of: Callable[..., Look]) -> Look:
    """Of a looped model with three value channels."""
    return look_of("1 (1)x2", values=3)
