"""The backward of matrix products: its gradients are those of attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ouroboros.nn import causal
from ouroboros.nn.attention import attend


def tensors(T: int, dtype: torch.dtype, C: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, 3, T, C, dtype=dtype).requires_grad_() for _ in range(3)]


def gradients(function, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    function(*copies).backward(upstream)
    return [t.grad for t in copies if t.grad is not None]


@pytest.mark.parametrize(("T", "rows"), [(2, 128), (7, 4), (33, 8), (40, 8), (64, 128)])
def test_gradients_equal_attention_in_float32(T, rows, monkeypatch):
    monkeypatch.setattr(causal, "ROWS", rows)
    inputs, upstream = tensors(T, torch.float32), torch.randn(2, 3, T, 8)
    ours = gradients(causal.CausalAttention.apply, inputs, upstream)
    exact = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, upstream)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_gradients_in_bfloat16_are_as_near_as_the_fused_kernel():
    inputs, upstream = tensors(96, torch.bfloat16, C=16), torch.randn(2, 3, 96, 16).bfloat16()

    def reference(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    exact = gradients(reference, [t.detach().float() for t in inputs], upstream.float())
    fused = gradients(reference, inputs, upstream)
    ours = gradients(causal.CausalAttention.apply, inputs, upstream)
    for mine, theirs, truth in zip(ours, fused, exact, strict=True):
        assert (mine.float() - truth).norm() <= 1.5 * (theirs.float() - truth).norm() + 1e-3 * truth.norm()


def test_long_windows_have_few_blocks(monkeypatch):
    monkeypatch.setattr(causal, "ROWS", 2)
    products = []
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: products.append(a.shape) or matmul(a, b))
    gradients(causal.CausalAttention.apply, tensors(100, torch.float32), torch.randn(2, 3, 100, 8))
    assert len(products) == 5 * causal.MAX_BLOCKS


def test_only_compiled_bfloat16_training_takes_this_path():
    q, k, _ = tensors(4, torch.bfloat16)
    assert not causal.suits(q, k)  # not compiling

    seen = []

    def probe(q, k):
        seen.append(causal.suits(q, k))
        return q + k

    compiled = torch.compile(probe, backend="eager", dynamic=False)
    compiled(q, k)
    assert seen[0]
    compiled(q.detach(), k.detach())
    compiled(q.detach().float().requires_grad_(), k.detach().float())
    compiled(*tensors(1, torch.bfloat16)[:2])
    assert not any(seen[1:])


def test_compiled_attention_trains_as_uncompiled():
    inputs, upstream = tensors(24, torch.bfloat16), torch.randn(2, 3, 24, 8).bfloat16()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, None), backend="aot_eager", dynamic=False)
    for mine, theirs in zip(
        gradients(compiled, inputs, upstream),
        gradients(lambda q, k, v: attend(q, k, v, None), inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine.float(), theirs.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("T", [2, 7, 64, 65, 130, 200])
def test_kept_probabilities_give_attention_and_its_gradients(T, monkeypatch):
    monkeypatch.setattr(causal, "MAX_BLOCKS", 3)  # 200 positions are blocks of 67, 67 and 66
    inputs, upstream = tensors(T, torch.float32), torch.randn(2, 3, T, 8)

    def reference(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.testing.assert_close(causal.KeptAttention.apply(*inputs), reference(*inputs), atol=1e-5, rtol=1e-5)
    ours, exact = (gradients(f, inputs, upstream) for f in (causal.KeptAttention.apply, reference))
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_position_does_not_see_what_follows_it():
    q, k, v = (t.detach() for t in tensors(80, torch.float32))
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, :, 50:] = torch.randn_like(t[:, :, 50:])
    before, after = (causal.KeptAttention.apply(*given) for given in ((q, k, v), changed))
    assert torch.equal(before[:, :, :50], after[:, :, :50]) and not torch.equal(before, after)


def test_only_training_in_float32_on_short_windows_keeps_probabilities(monkeypatch):
    monkeypatch.setattr(causal, "KEPT_POSITIONS", 6)
    q, k, v = tensors(6, torch.float32)
    assert causal.suits_kept(q, k)
    assert not causal.suits_kept(*tensors(7, torch.float32)[:2])  # too long
    assert not causal.suits_kept(*tensors(6, torch.bfloat16)[:2])
    assert not causal.suits_kept(q[:, :, -1:], k)  # one new token behind a cache
    with torch.no_grad():
        assert not causal.suits_kept(q, k)
    assert "KeptAttention" in type(attend(q, k, v, None, once=True).grad_fn).__name__
    for other in (attend(q, k, v, None), attend(q, k, v, None, 0.1, once=True), attend(q, k, v, None, scale=1.0)):
        assert "KeptAttention" not in type(other.grad_fn).__name__


def test_second_derivatives_in_training_are_an_error_and_not_wrong():
    q, k, v = tensors(4, torch.float32)
    with pytest.raises(RuntimeError, match="no second derivatives: call model.eval"):
        torch.autograd.grad(attend(q, k, v, None, once=True).sum(), q, create_graph=True)
