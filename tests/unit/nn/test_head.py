"""The head: logits scaled, then capped."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.head import LinearHeadSpec


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (3.0, None), (1.0, 0.5), (3.0, 0.5)])
def test_formula(scale: float, cap: float | None) -> None:
    head, logits = build(LinearHeadSpec(logit_scale=scale, logit_softcap=cap), ModelSpec()), torch.randn(2, 3, 7)
    expected = scale * logits
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    torch.testing.assert_close(head(logits), expected)
    assert list(head.parameters()) == [] and (head.scale, head.softcap) == (scale, cap)


def test_plain_logits_are_as_they_are() -> None:
    logits = torch.randn(2, 7)
    assert build(LinearHeadSpec(), ModelSpec())(logits) is logits
