"""What pooling costs, remembers and says."""

from __future__ import annotations

import dataclasses
from typing import Any

from ouroboros.accounting import cost, text_flops
from ouroboros.config import ModelSpec
from ouroboros.config.parts.modulated import ControllerSpec, ModulatedAttentionSpec, ModulatedFeedForwardSpec

D, RANK, STYLE = 16, 3, 5


def model(*loop: Any) -> ModelSpec:
    """A model whose loop is modulated."""
    parts: Any = {"mixer": ModulatedAttentionSpec(rank=RANK), "ffn": ModulatedFeedForwardSpec(rank=RANK)}
    return ModelSpec(layout="1", vocab_size=11, hidden_size=D).replace(layout="(1)x2", loop=loop, **parts)


def test_only_a_mean_of_the_prefix_is_remembered() -> None:
    remembered = {pooling: ControllerSpec(pooling=pooling).recent_values(D) for pooling in ("token", "all")}  # pyrefly: ignore
    assert remembered == {"token": 0, "all": 0}
    spec = model(ControllerSpec(rank=RANK, style=STYLE, pooling="prefix"))
    assert cost(spec).state_values == 2 * D, "a sum for each of the two loops"


def test_what_is_done_once_for_a_text_is_not_counted_for_its_tokens() -> None:
    per_token, at_once = (model(ControllerSpec(rank=RANK, style=STYLE, pooling=name)) for name in ("token", "all"))  # pyrefly: ignore
    network = 2 * 2 * (D * 2 * STYLE + 3 * STYLE * 2 * STYLE + 2 * STYLE * STYLE + 7 * STYLE * RANK)
    assert text_flops(per_token, per_token.schedule) == 0
    assert text_flops(at_once, at_once.schedule) == network, "for each of the two loops"
    assert text_flops(at_once, at_once.schedule.with_loops(6)) == 3 * network
    assert cost(per_token).flops_per_token - cost(at_once).flops_per_token == network


def test_the_published_pooling_is_said_to_see_later_tokens() -> None:
    spec = model(ControllerSpec(rank=RANK, pooling="all"))
    assert any("not causal" in warning for warning in spec.warnings())
    causal = dataclasses.replace(spec, loop=(ControllerSpec(rank=RANK),))
    assert not causal.warnings() and not any(part.sees_later for part in causal.parts)
