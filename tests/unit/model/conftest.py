"""Reproducible random numbers, and a small model that every test can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.eval.subject import perturb
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def base() -> ModelSpec:
    """A small looped model."""
    spec = ModelSpec(layout="1 (1)x2 1", vocab_size=31, hidden_size=16, max_position_embeddings=64)
    return spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24))


@pytest.fixture
def build(base: ModelSpec) -> Callable[..., OuroborosForCausalLM]:
    """Builds a model of the base with changes, perturbed so that nothing is neutral."""

    def built(*, noise: float = 0.1, eos: int | None = 30, **changes: Any) -> OuroborosForCausalLM:
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(base.replace(**changes), eos_token_id=eos)).eval()
        perturb(model, noise)
        return model

    return built


@pytest.fixture
def ids() -> Tensor:
    """Two texts of nine tokens."""
    return torch.randint(0, 30, (2, 9))
