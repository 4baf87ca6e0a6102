"""A model that is given targets returns the loss of its logits, and no logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.model.modeling import OuroborosForCausalLM


class Squared(nn.Module):
    """A head that needs all logits at once."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - 0.1 * logits.square().mean(-1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, None),
        ({"head": LinearHeadSpec(logit_softcap=2.0, logit_scale=0.5), "tie_embeddings": False}, None),
        ({}, Squared()),
    ],
    ids=["plain", "scaled and capped", "another head"],
)
def test_the_loss_is_that_of_the_logits_and_has_their_gradients(
    build: Callable[..., OuroborosForCausalLM], ids: Tensor, changes: dict[str, Any], head: Any, smoothing: float
) -> None:
    model, targets = build(**changes).train(), torch.randint(0, 30, (2, 9))
    model.head = head or model.head
    targets[0, 3] = -100
    found = model(input_ids=ids, use_cache=False, targets=targets, label_smoothing=smoothing)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
    assert found.logits is None and not found.unsmoothed_loss.requires_grad
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.unsmoothed_loss, F.cross_entropy(logits, targets.flatten()))
    weights = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(found.loss, weights), torch.autograd.grad(expected, weights))
