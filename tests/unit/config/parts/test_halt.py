"""What halting costs."""

from __future__ import annotations

import pytest

from ouroboros.accounting import cost, describe
from ouroboros.config import ModelSpec
from ouroboros.config.needs import idle
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.errors import OuroborosError


def test_published_counts() -> None:
    """Section 3 of the specification: Qwen2.5-3B, and a model of 135 million parameters."""
    assert HaltSpec().parameters(2048, loops=64) == 590_593
    assert HaltSpec().parameters(576, loops=64) == 213_761


def test_ranges() -> None:
    with pytest.raises(OuroborosError, match="loop.halt.hidden must be >= 1, got 0"):
        HaltSpec(hidden=0)
    with pytest.raises(OuroborosError, match="loop.halt.prior must be between 0 and 1, got 1"):
        HaltSpec(prior=1.0)
    with pytest.raises(OuroborosError, match="loop.halt.cost_weight must be > 0, got 0"):
        HaltSpec(cost_weight=0.0)


def test_operations_are_counted_at_their_most() -> None:
    """Every loop, and the drawing says so; as published there is nothing to say."""
    model = ModelSpec(layout="1 (1)x4", loop=(HaltSpec(),))
    published = ModelSpec(layout="1 (1)x4", loop=(HaltSpec(freeze=False),))
    assert cost(model).flops_per_token == cost(published).flops_per_token
    said = "in all loops (tokens may halt before)"
    assert said in describe(model) and said not in describe(published)


def test_idle_options_are_refused() -> None:
    found = dict(idle(HaltSpec(cost="steps")))
    assert found.keys() == {"prior"}
    assert dict(idle(HaltSpec())).keys() == {"prior", "cost_weight"} and not dict(idle(HaltSpec(cost="geometric")))
