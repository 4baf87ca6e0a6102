"""The closed-form gradients are autograd's of the plain formula, and lower precision stays outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.nn.delta_kernel import CausalMix, DeltaUpdate, inverse_length, wide

EPS = 0.5
"""Of the guard: large enough to matter in every gradient."""


def tensors(values: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    """State (2, 3, V, 5), update, gate and value."""
    torch.manual_seed(values)
    state, update = torch.randn(2, 3, values, 5), torch.randn(2, 3, 5) * scale
    gate, value = 2 * torch.rand(2, 3, 1), torch.randn(2, 3, values)
    return tuple(t.to(dtype).requires_grad_() for t in (state, update, gate, value))


def plain(state: Tensor, update: Tensor, gate: Tensor, value: Tensor, guard: str, erase: bool) -> Tensor:
    """The formula as it stands."""
    length = update.square().sum(-1, keepdim=True)
    length = (length + EPS**2).sqrt() if guard == "additive" else length.sqrt().clamp(min=EPS)
    k = update / length
    error = value - torch.einsum("btvd,btd->btv", state, k) if erase else value
    return state + torch.einsum("btx,btv,btd->btvd", gate, error, k)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("guard", ["additive", "clamped"])
@pytest.mark.parametrize("values", [1, 2, 4])
def test_update_and_gradients(values: int, guard: str, erase: bool) -> None:
    for scale in (1.0, 0.05):  # the second is below the clamp
        given = tensors(values, scale=scale)
        ours = DeltaUpdate.apply(*given, guard, EPS, erase)
        theirs = plain(*given, guard, erase)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(theirs)
        for mine, other in zip(
            torch.autograd.grad((ours * weight).sum(), given),
            torch.autograd.grad((theirs * weight).sum(), given),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("guard", ["additive", "clamped"])
def test_gradcheck(guard: str) -> None:
    assert torch.autograd.gradcheck(lambda *t: DeltaUpdate.apply(*t, guard, EPS, True), tensors(3))


@pytest.mark.parametrize("guard", ["additive", "clamped"])
def test_no_update_changes_nothing_and_has_finite_gradients(guard: str) -> None:
    state, update, gate, value = tensors(2, torch.float32)
    update = torch.zeros_like(update, requires_grad=True)
    new = DeltaUpdate.apply(state, update, gate, value, guard, 1e-6, True)
    assert torch.equal(new, state)
    new.sum().backward()
    assert update.grad is not None and update.grad.isfinite().all()


@pytest.mark.parametrize("values", [1, 4])
def test_autocast_rounds_nothing(values: int) -> None:
    given = tensors(values, torch.float32)
    expected = DeltaUpdate.apply(*given, "additive", EPS, True)
    gradients = torch.autograd.grad(expected.square().sum(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DeltaUpdate.apply(*given, "additive", EPS, True)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        for mine, other in zip(torch.autograd.grad(found.square().sum(), given), gradients, strict=True):
            assert torch.equal(mine, other)


def test_a_low_precision_state_is_rounded_once() -> None:
    given = tensors(4, torch.float32)
    state, update = (t.detach().bfloat16().requires_grad_() for t in given[:2])
    new = DeltaUpdate.apply(state, update, *given[2:], "additive", EPS, True)
    exact = plain(state.double(), update.double(), *(t.double() for t in given[2:]), "additive", True)
    assert torch.equal(new, exact.bfloat16())
    new.sum().backward()
    assert state.grad is not None and state.grad.dtype == torch.bfloat16
    assert update.grad is not None and update.grad.dtype == torch.bfloat16


def test_second_derivatives_are_refused() -> None:
    given = tensors(2)
    (first,) = torch.autograd.grad(
        DeltaUpdate.apply(*given, "additive", EPS, True).square().sum(), given[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("taps", "channels_out", "channels_in"), [(1, 1, 4), (3, 1, 2), (4, 3, 1), (2, 3, 2), (1, 1, 1)]
)
def test_causal_mix(taps: int, channels_out: int, channels_in: int) -> None:
    """Against a grouped convolution over time, in value and gradient."""
    B, T, D = 2, 5, 3
    torch.manual_seed(0)
    x = torch.randn(B, T + taps - 1, channels_in, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(taps, channels_out, channels_in, D, dtype=torch.float64, requires_grad=True)
    series = x.permute(0, 3, 2, 1).reshape(B, D * channels_in, -1)
    kernel = weight.permute(3, 1, 2, 0).reshape(D * channels_out, channels_in, taps)
    expected = F.conv1d(series, kernel, groups=D).view(B, D, channels_out, T).permute(0, 3, 2, 1)
    torch.testing.assert_close(CausalMix.apply(x, weight), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(CausalMix.apply, (x, weight))


def test_causal_mix_sums_low_precision_in_float32() -> None:
    x, weight = torch.randn(1, 6, 4, 8).bfloat16(), torch.randn(3, 1, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CausalMix.apply(x, weight)
    assert torch.equal(found, CausalMix.apply(x.float(), weight))
    assert found.dtype == torch.float32


def test_inverse_length() -> None:
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(inverse_length(h, "additive", 0.1), torch.tensor([[25.01**-0.5], [10.0]]))
    torch.testing.assert_close(inverse_length(h, "clamped", 0.1), torch.tensor([[0.2], [10.0]]))


def test_wide() -> None:
    kept = torch.zeros(1, dtype=torch.float64)
    assert wide(kept) is kept
    assert wide(kept.bfloat16()).dtype == torch.float32
