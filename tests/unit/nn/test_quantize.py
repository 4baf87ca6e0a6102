"""Row-wise quantisation, and gradients that pass it."""

import pytest
import torch
from torch import nn

from ouroboros.nn.quantize import codes, noisy, quantized, row_steps, straight_through


def weights(rows: int = 7, columns: int = 40, std: float = 0.3) -> torch.Tensor:
    return std * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("clip", [1.0, 0.9995, 0.97, 0.5])
@pytest.mark.parametrize("columns", [1, 2, 40, 301])
def test_the_step_is_a_quantile_of_each_row(clip, columns):
    w = weights(columns=columns)
    expected = torch.quantile(w.abs(), clip, dim=1, keepdim=True) / 31
    torch.testing.assert_close(row_steps(w, 6, clip=clip), expected)


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_codes_are_the_nearest_and_within_their_bits(bits):
    w, most = weights(), 2 ** (bits - 1) - 1
    step = row_steps(w, bits)
    found = codes(w, step, bits)
    assert found.abs().amax(1).eq(most).all() and torch.equal(found, found.round())
    assert ((found * step - w).abs() <= step * (0.5 + 1e-5)).all()
    torch.testing.assert_close(quantized(w, bits), found * step)
    clipped = codes(10 * w, step, bits)
    assert (clipped.min().item(), clipped.max().item()) == (-most - 1, most)


def test_halves_go_to_the_even_code():
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 31.0]])
    assert codes(w, row_steps(w, 6), 6).tolist() == [[0, 2, 2, 0, -2, 31]]


def test_a_smallest_step_takes_levels_from_small_weights():
    small = weights(std=0.02)
    assert quantized(small, 6, smallest=1 / 31).div(1 / 31).abs().max().item() < 4
    error = (quantized(small, 6) - small).square().mean() / small.square().mean()
    assert error < 1e-3 < (quantized(small, 6, smallest=1 / 31) - small).square().mean() / small.square().mean()
    assert torch.equal(quantized(torch.zeros(2, 3), 6), torch.zeros(2, 3))  # no division by zero


def test_noise_is_within_half_a_step_of_the_rows_largest():
    w = weights(rows=3, columns=4000)
    found = noisy(w, row_steps(w, 6), torch.Generator().manual_seed(1)) - w
    half = w.abs().amax(1, keepdim=True) / 31 / 2
    assert (found.abs() <= half * (1 + 1e-4)).all() and (found.abs().amax(1, keepdim=True) > 0.98 * half).all()
    assert found.mean(1).abs().max() < 0.05 * half.max()
    assert torch.equal(noisy(w, row_steps(w, 6), torch.Generator().manual_seed(1)) - w, found)


def test_gradients_pass_straight_through_and_the_weights_come_back():
    layer, x = nn.Linear(40, 7, bias=False), weights(rows=5)
    before = layer.weight.detach().clone()
    with straight_through({layer.weight: lambda w: quantized(w, 4)}):
        inside = layer.weight.detach().clone()
        layer(x).square().sum().backward()
    assert torch.equal(layer.weight, before) and torch.equal(inside, quantized(before, 4))
    w = before.clone().requires_grad_()
    estimated = w + (quantized(w, 4) - w).detach()
    (x @ estimated.T).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad)
    with pytest.raises(RuntimeError), straight_through({layer.weight: lambda w: 0 * w}):
        raise RuntimeError
    assert torch.equal(layer.weight, before)
