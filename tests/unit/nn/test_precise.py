"""Tensors that stay float32: through every cast, on the module and on one around it, with gradients, in copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ouroboros.config import RopeSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.nn.osam import Osam
from ouroboros.nn.precise import Precise
from ouroboros.nn.rope import Rope

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "to device and type": lambda model: model.to("cpu", torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "twice": lambda model: model.half().bfloat16(),
    "there and back": lambda model: model.bfloat16().float(),
    "through double": lambda model: model.double().bfloat16(),
}


class Toy(Precise):
    """One parameter and one buffer that stay, one parameter that does not."""

    PRECISE = ("angle", "speed", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.rand(5))
        self.weight = nn.Parameter(torch.rand(5))
        self.register_buffer("speed", torch.rand(5))


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_cast_rounds_them(cast: Callable[[nn.Module], nn.Module]) -> None:
    around = nn.Sequential(Toy(), nn.Linear(2, 2))
    toy = around[0]
    gradient = torch.rand(5)
    toy.angle.grad, toy.weight.grad = gradient.clone(), torch.rand(5)
    before = copy.deepcopy(toy)
    cast(around)
    assert toy.angle.dtype == toy.speed.dtype == toy.angle.grad.dtype == torch.float32
    assert torch.equal(toy.angle, before.angle) and torch.equal(toy.speed, before.speed)
    assert torch.equal(toy.angle.grad, gradient)
    assert not torch.equal(toy.weight, before.weight), "everything else is cast"
    assert toy.angle.requires_grad and isinstance(toy.angle, nn.Parameter)


def test_more_bits_and_no_memory_are_as_in_any_module() -> None:
    toy = Toy()
    before = copy.deepcopy(toy)
    toy.double()
    assert toy.angle.dtype == toy.speed.dtype == torch.float64
    assert torch.equal(toy.angle.float(), before.angle)
    meta = copy.deepcopy(before).to("meta").bfloat16()
    assert meta.angle.is_meta and meta.angle.dtype == torch.float32 and meta.weight.dtype == torch.bfloat16
    assert meta.to_empty(device="cpu").angle.shape == (5,)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_rotary_tables_far_into_a_text_are_the_same(cast: Callable[[nn.Module], nn.Module]) -> None:
    rope, positions = Rope(RopeSpec(), 64), torch.tensor([[0, 100, 4095, 100_000]])
    expected = rope(positions)
    assert all(torch.equal(a, b) for a, b in zip(cast(rope)(positions), expected, strict=True))


def test_a_memory_turns_and_fades_as_before() -> None:
    spec = OsamSpec(buckets=64, readout_hidden=8, frequencies=4, decay=True, detach_state=False)
    osam = Osam(spec, 16, 1e-6)
    expected = (*osam.turn(), *osam.phases())
    sketches = osam.key_sketch
    osam.bfloat16()
    found = (*osam.turn(), *osam.phases())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(osam.key_sketch.sign_D.float(), sketches.sign_D), "signs are exact in any format"
    assert torch.equal(osam.key_sketch.bucket_D, sketches.bucket_D)
    assert osam.q_proj.weight.dtype == torch.bfloat16
