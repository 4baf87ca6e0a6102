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
from ouroboros.systems.delta.report import Look, look_at


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
def look(delta_model: Callable[..., tuple[Any, Any, torch.Tensor]]) -> Look:
    """Of a looped model with three value channels."""
    model, made, ids = delta_model("1 (1)x2", values=3)
    return look_at(model, made, ids)
