"""Steps of every clip, and rounding of tensors of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.errors import OuroborosError
from ouroboros.pack.quantize import SQUARES, Clip, choose_steps, entropy, quantize

WHOLE = Clip(by="quantile", value=1.0)
CLIPS = [SQUARES, WHOLE, Clip(by="quantile", value=0.99), Clip(by="sigma", value=3.0), Clip(by="size", value=3.0)]


def drawn(*shape: int, seed: int = 0, std: float = 0.05) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def error(w: Tensor, bits: int, **options) -> float:
    return float((quantize(w, bits, **options).dense() - w).square().sum() / w.square().sum())


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.by)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_the_nearest_for_the_stored_step(clip, bits):
    w = drawn(6, 32)
    found = quantize(w, bits, clip=clip)
    steps = found.scales.float()
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    nearest = (w[..., None] - levels * steps[..., None]).abs().argmin(dim=-1)
    distance = (found.dense() - w).abs()
    assert torch.allclose(distance, (w - levels[nearest] * steps).abs(), atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_least_squares_is_no_worse_than_any_other_clip(bits):
    w = drawn(8, 64, seed=1)
    w[0, 0] = 1.0  # an outlier
    best = error(w, bits)
    for clip in CLIPS[1:4]:
        assert best <= error(w, bits, clip=clip) * 1.02
    assert bits > 4 or best < 0.95 * error(w, bits, clip=WHOLE)


def test_more_bits_and_smaller_groups_have_less_error():
    w = drawn(8, 64, seed=2) * torch.linspace(0.1, 3, 64)
    errors = [error(w, bits) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert error(w, 4, group=8) < 0.7 * error(w, 4)
    assert quantize(w, 4, group=8).scales.shape == (8, 8)


@pytest.mark.parametrize("std", [1e-5, 1e-3, 1.0, 1e3])
def test_error_does_not_depend_on_the_size_of_weights(std):
    assert error(drawn(4, 64, std=std), 4) == pytest.approx(error(drawn(4, 64, std=1.0), 4), rel=0.15)


def test_weights_below_the_smallest_step():
    w = drawn(2, 8, std=1e-9)
    assert torch.equal(quantize(w, 8).dense(), torch.zeros(2, 8))
    assert float((quantize(drawn(2, 8, std=1e-7), 8).dense() - drawn(2, 8, std=1e-7)).abs().max()) <= 2.0**-25


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.by)
def test_rows_of_zeros_stay_zero(clip):
    w = drawn(3, 16)
    w[1] = 0
    found = quantize(w, 4, clip=clip).dense()
    assert torch.equal(found[1], torch.zeros(16)) and found[0].any()
    assert not quantize(torch.zeros(5), 4, clip=clip).dense().any()


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (2, 3, 4, 5)])
def test_other_shapes(shape):
    w = drawn(*shape) if shape else torch.tensor(0.3)
    found = quantize(w, 8)
    assert found.dense().shape == w.shape
    assert len(found.codes) == (shape[0] if len(shape) > 1 else 1)
    assert torch.allclose(found.dense(), w, atol=2e-3)


def test_sigma_makes_codes_of_every_row_alike():
    w = drawn(2, 4096) * torch.tensor([[1.0], [30.0]])
    found = quantize(w, 6, clip=Clip(by="sigma", value=4.0)).codes.double().std(dim=1)
    assert found[0] == pytest.approx(float(found[1]), rel=0.05)
    assert found[0] == pytest.approx(31 / 4, rel=0.05)


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
def test_size_is_the_entropy_of_the_codes(bits):
    assert entropy(quantize(drawn(16, 256), 8, clip=Clip(by="size", value=bits)).codes) == pytest.approx(bits, abs=0.02)


def test_entropy():
    assert entropy(torch.tensor([[-2, -2, 1, 1]], dtype=torch.int8)) == 1.0
    assert entropy(torch.zeros(3, 3, dtype=torch.int8)) == 0.0
    assert entropy(torch.arange(-128, 128, dtype=torch.int8)[None]) == 8.0


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), {}, "'here' holds NaN"),
        (torch.tensor([[1.0, float("inf")]]), {}, "'here' holds NaN or infinity"),
        (torch.zeros(0, 3), {}, "'here' is empty"),
        (torch.ones(2, 6), {"group": 4}, "'here' has 6 columns, which groups of 4 do not divide"),
        (torch.full((2, 6), 1e30), {}, "'here' has weights too large"),
        (torch.full((2, 6), 1e30), {"clip": Clip(by="sigma", value=3.0)}, "'here' has weights too large"),
    ],
)
def test_what_cannot_be_coded_is_refused_by_name(w, options, message):
    with pytest.raises(OuroborosError, match=message):
        quantize(w, 4, name="here", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "quantile"}, "needs a value"),
        ({"by": "quantile", "value": 1.5}, "up to 1"),
        ({"by": "sigma", "value": 0.0}, "above 0"),
        ({"by": "squares", "value": 0.5}, "takes no value"),
    ],
)
def test_clips_that_mean_nothing(options, message):
    with pytest.raises(OuroborosError, match=message):
        Clip(**options)


def test_bits_out_of_range():
    with pytest.raises(OuroborosError, match="2 to 8 bits, got 9"):
        choose_steps(drawn(2, 4), 9)
