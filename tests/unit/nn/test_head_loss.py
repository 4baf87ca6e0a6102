"""The head and its loss in one give what logits and cross-entropy give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ouroboros.nn import head_loss as module
from ouroboros.nn.head_loss import IGNORED, head_loss


def inputs(N: int = 11, D: int = 6, V: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.randint(0, V, (N,))


def reference(x, weight, targets, smoothing, scale, softcap):
    logits = x @ weight.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return tuple(F.cross_entropy(logits, targets, label_smoothing=s) for s in (smoothing, 0.0))


@pytest.mark.parametrize("chunk", [1, 40, 2**20])  # one row at a time, three, all
@pytest.mark.parametrize(
    ("smoothing", "scale", "softcap"), [(0.0, 1.0, None), (0.1, 1.0, None), (0.0, 0.5, 3.0), (0.2, 2.0, 4.0)]
)
def test_losses_and_gradients_are_those_of_cross_entropy(chunk, smoothing, scale, softcap, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    x, weight, targets = inputs()
    targets[::4] = IGNORED
    found = head_loss(x, weight, targets, smoothing=smoothing, scale=scale, softcap=softcap)
    expected = reference(x, weight, targets, smoothing, scale, softcap)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(3 * losses[0], (x, weight)) for losses in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert not found[1].requires_grad


def test_under_autocast_products_are_in_bfloat16_and_the_loss_is_not():
    x, weight, targets = inputs(40, 16, 50)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(x, weight, targets)
        expected = F.cross_entropy(F.linear(x, weight).float(), targets)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-3
    ours, theirs = (torch.autograd.grad(value, (x, weight)) for value in (loss, expected))
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32 and (mine - their).norm() < 0.02 * their.norm()


def test_no_target_at_all_is_not_a_number_as_in_torch():
    x, weight, targets = inputs()
    assert head_loss(x, weight, torch.full_like(targets, IGNORED))[0].isnan()


def test_a_sure_and_wrong_model_has_a_finite_loss():
    x, weight = torch.ones(1, 1).requires_grad_(), torch.tensor([[2000.0], [-2000.0]]).requires_grad_()
    loss, _ = head_loss(x, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 4000 and x.grad is not None and x.grad.isfinite().all()
