"""The published packing beside what it could be; its recorded numbers are golden cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.errors import OuroborosError
from ouroboros.pack.coded import Coded
from ouroboros.pack.gptq import objective, solve
from ouroboros.pack.quantize import quantize
from ouroboros.systems.crawler import packing


def drawn(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def relative(w: Tensor, coded: Coded) -> float:
    return float((coded.dense() - w).square().mean() / w.square().mean())


@pytest.mark.parametrize(("std", "published"), [(0.01, 0.71), (0.02, 0.22), (0.1, 8.7e-3), (0.5, 9.1e-4)])
def test_the_floor_is_what_small_weights_lose_by(std, published):
    w = drawn(64, 512, std=std)
    assert relative(w, packing.int6(w)) == pytest.approx(published, rel=0.12)
    assert relative(w, quantize(w, 6)) < 9.5e-4


def test_gptq_as_shipped_is_several_times_worse_than_gptq_on_correlated_inputs():
    x = drawn(4000, 48, seed=1) * 0.85 ** torch.arange(48)
    x = x @ torch.linalg.qr(drawn(48, 48, seed=2))[0]
    w, steps = drawn(32, 48, seed=3), packing.row_scales(drawn(32, 48, seed=3)).half()
    shipped, standard = _beside_rounding(w, steps, x.T @ x / len(x))
    assert shipped > 4 * standard
    assert _beside_rounding(w, steps, torch.eye(48)) == pytest.approx((1, 1), rel=0.02)  # white inputs leave rounding


def _beside_rounding(w: Tensor, steps: Tensor, h: Tensor) -> tuple[float, float]:
    """The objective of the shipped procedure and of the standard one, as shares of rounding's."""
    rounding = objective(w, (w / steps.float()).round().clamp(-31, 31) * steps.float(), h)
    shipped = objective(w, packing.gptq(w, h).dense(), h)
    return shipped / rounding, objective(w, solve(w, h, steps, 6).codes_RC * steps.float(), h) / rounding


def test_export_keeps_what_is_small_and_rounds_without_moments():
    tensors = {
        "flat_blocks.0.attn.c_q.weight": drawn(16, 16),
        "flat_blocks.0.mlp.fc.weight": drawn(16, 16, seed=1),
        "tok_emb.weight": drawn(32, 16),
        "flat_blocks.0.mlp_scale": drawn(80),
        "smear.gate": drawn(16),
        "steps": torch.arange(3),
    }
    stored = packing.export(tensors, {"flat_blocks.0.attn.c_q": torch.eye(16)}, small=64)
    kept = {name: value.dtype for name, value in stored.items() if isinstance(value, Tensor)}
    assert kept == {
        "flat_blocks.0.mlp_scale": torch.float32,
        "smear.gate": torch.float16,
        "steps": torch.int64,
    }
    bits = {name: value.bits for name, value in stored.items() if isinstance(value, Coded)}
    assert bits == {
        "flat_blocks.0.attn.c_q.weight": 6,
        "flat_blocks.0.mlp.fc.weight": 6,
        "tok_emb.weight": 8,
    }
    rounded = packing.int6(tensors["flat_blocks.0.mlp.fc.weight"])
    value = stored["flat_blocks.0.mlp.fc.weight"]
    assert isinstance(value, Coded) and torch.equal(value.codes, rounded.codes)


def test_zeros():
    assert not packing.int6(torch.zeros(7)).dense().any()
    assert not packing.int8(torch.zeros(7)).dense().any()
    assert not packing.int8(torch.zeros(2, 7)).dense().any()


def test_prune_takes_no_more_than_there_are():
    coded = {"a": packing.int6(drawn(4, 8)), "b": packing.int6(drawn(2, 8, std=0.02))}
    pruned = packing.prune(coded, 10_000)
    assert all(not bool((value.codes.abs() == 1).any()) for value in pruned.values())
    assert packing.prune({}, 3) == {}


def test_a_stride_that_one_byte_cannot_say():
    with pytest.raises(OuroborosError, match="stride must be 1 to 255"):
        packing.shuffled(b"abc", 256)
