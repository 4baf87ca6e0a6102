"""Rotary embedding against complex rotation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec, RopeSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.rope import Rope, rotate
from ouroboros.nn.visit import VisitContext


def complex_rotation(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    """Channel i and channel i + n/2 are the real and imaginary part of a number turned by its angle."""
    n = int(x.shape[-1] * spec.fraction) // 2 * 2
    pairs = torch.complex(x[..., : n // 2].double(), x[..., n // 2 : n].double())
    speeds = spec.base ** (-2 * torch.arange(n // 2, dtype=torch.float64) / max(n, 1))
    angles = positions[:, None, :, None].double() / spec.scale * speeds
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[..., n:].double()), dim=-1)


@pytest.mark.parametrize(
    "spec",
    [
        RopeSpec(),
        RopeSpec(base=500.0),
        RopeSpec(scale=8.0),
        RopeSpec(fraction=0.5),
        RopeSpec(fraction=0.45),
        RopeSpec(fraction=0.0),
    ],
    ids=str,
)
def test_is_complex_rotation(spec: RopeSpec) -> None:
    x, positions = torch.randn(2, 3, 4, 12), torch.tensor([[0, 1, 2, 7], [3, 50, 100, 200]])
    torch.testing.assert_close(
        rotate(x, *Rope(spec, 12)(positions)).double(), complex_rotation(x, positions, spec), rtol=1e-4, atol=1e-4
    )


def test_slows_by_wavelength() -> None:
    """Per channel and in plain words: Llama 3.1 keeps fast turns, slows slow ones by eight, and mixes in between."""
    spec = RopeSpec(base=500.0, slowing=8.0, slowing_context=40, slowing_low=1.0, slowing_high=4.0)
    plain, found = Rope(RopeSpec(base=500.0), 24).inv_freq, Rope(spec, 24).inv_freq
    seen = set()
    for before, after in zip(plain.tolist(), found.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 40 / 4:
            case, expected = "fast", before
        elif wavelength > 40 / 1:
            case, expected = "slow", before / 8
        else:
            share = (40 / wavelength - 1) / (4 - 1)
            case, expected = "between", (1 - share) * before / 8 + share * before
        seen.add(case)
        assert after == pytest.approx(expected, rel=1e-5)
    assert seen == {"fast", "between", "slow"}
    (used,) = spec.by_use(24, 4096)
    assert used == spec


@given(
    query=st.integers(0, 300),
    key=st.integers(0, 300),
    shift=st.integers(0, 300),
    fraction=st.sampled_from([1.0, 0.5]),
    scale=st.sampled_from([1.0, 3.0]),
)
def test_products_depend_on_the_distance_alone(query: int, key: int, shift: int, fraction: float, scale: float) -> None:
    rope = Rope(RopeSpec(fraction=fraction, scale=scale), 8)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def product(at_query: int, at_key: int) -> Tensor:
        turned_q = rotate(q, *rope(torch.tensor([[at_query]])))
        turned_k = rotate(k, *rope(torch.tensor([[at_key]])))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(product(query, key), product(query + shift, key + shift), rtol=1e-3, atol=1e-3)


def test_position_zero_and_fraction_zero_change_nothing() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(rotate(x, *Rope(RopeSpec(), 8)(torch.zeros(1, 3))), x)
    assert rotate(x, *Rope(RopeSpec(fraction=0.0), 8)(torch.arange(3)[None])) is x


def test_length_is_kept() -> None:
    x = torch.randn(1, 1, 5, 8)
    turned = rotate(x, *Rope(RopeSpec(), 8)(torch.arange(5)[None] * 11))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.equal(turned[:, :, 1:], x[:, :, 1:])


def test_angles_are_float32_in_a_half_precision_model() -> None:
    rope = Rope(RopeSpec(), 8)
    cos, sin = rope(torch.tensor([[1000]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert rotate(torch.randn(1, 1, 1, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_has_no_weights() -> None:
    rope = Rope(RopeSpec(), 8)
    assert list(rope.parameters()) == []
    assert rope.state_dict() == {}


def test_each_use_of_a_block_has_its_divisor_and_later_ones_the_last() -> None:
    """Of the tables that the visits of a model are given; blocks that differ in the divisors alone have their own."""
    override = BlockOverride(where="1", set={"mixer.rope.loop_scales": [9.0, 2.0], "mixer.rope.original_context": None})
    rope = RopeSpec(original_context=8)
    spec = ModelSpec(layout="1 (1)x2", vocab_size=11, hidden_size=16, max_position_embeddings=32, overrides=(override,))
    spec = spec.replace(mixer=AttentionSpec(num_heads=2, rope=rope), ffn=FeedForwardSpec(intermediate_size=8))
    model, found = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval(), {}

    def keep(block: object, context: VisitContext, before: Tensor, after: Tensor) -> None:
        assert context.visit is not None
        found[context.visit.block, context.visit.loop] = context.rotary[0]

    with observe(model, keep):
        model(torch.arange(7)[None], loops=3, use_cache=False)
    assert sorted(found) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    exponents = torch.arange(4, dtype=torch.float64) / 4
    for (block, loop), cos in found.items():
        base, divisor = (10_000 * 4 ** (8 / 6), 1) if block == 0 else (10_000, [9, 2, 2][loop])
        angles = torch.arange(7)[:, None] / divisor * base**-exponents
        torch.testing.assert_close(cos[0, 0, :, :4].double(), angles.cos(), rtol=1e-5, atol=1e-5)
