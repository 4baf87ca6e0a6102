"""A model that is given targets returns the loss of its logits, and no logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ouroboros
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, Recipe


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 2.0, "logit_scale": 0.5, "tie_embeddings": False}])
def test_the_loss_is_that_of_the_logits_and_has_their_gradients(changes):
    spec = ModelSpec(
        layout="1 (1)x2",
        hidden_size=16,
        mixer=AttentionSpec(num_heads=2),
        ffn=FeedForwardSpec(intermediate_size=24),
        **changes,
    )
    model = ouroboros.build(Recipe(name="small", model=spec)).train()
    ids, targets = (torch.randint(0, 200, (2, 9)) for _ in range(2))
    targets[0, 3] = -100
    found = model(input_ids=ids, use_cache=False, targets=targets, label_smoothing=0.1)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.1)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.unsmoothed_loss, F.cross_entropy(logits, targets.flatten()))
    weights = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(found.loss, weights), torch.autograd.grad(expected, weights))
