"""Rotary position embedding. Shapes: B batch, T positions, H heads, C channels per head, P rotated pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ouroboros.config import BlockSpec, ModelSpec, RopeSpec
from ouroboros.nn.delta_kernel import wide
from ouroboros.nn.part import Init, Started
from ouroboros.nn.precise import Precise


def rotary_of(block: BlockSpec, spec: ModelSpec) -> list[tuple[RopeSpec, int]]:
    """For each use of a block its rotary embedding and the channels that it is made for; of none where nothing is
    rotated."""
    rotary = block.mixer.rotary(spec.hidden_size)
    if rotary is None:
        return [(RopeSpec(fraction=0.0), 2)]
    rope, channels = rotary if spec.rotates else (RopeSpec(fraction=0.0), rotary[1])
    return [(plain, channels) for plain in rope.by_use(channels, spec.max_position_embeddings)]


class Rope(Precise, Started):
    """Angles ``position / scale * base^(-2i / n)`` for the first ``n`` channels of a head (Su et al. 2021, eq. 15).

    Has no parameters. Frequencies and angles are float32 whatever the model's dtype.

    Args:
        spec: base, rotated fraction and position scale.
        head_dim: C, channels per head.
    """

    PRECISE = ("inv_freq",)

    inv_freq: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.rotated = spec.rotated(head_dim)
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def reset_parameters(self, init: Init | None = None) -> None:
        """The frequencies, which transformers leaves empty where it builds a model to be loaded."""
        self.inv_freq.copy_(self.frequencies())

    def frequencies(self) -> Tensor:
        """``base^(-2i / n) / scale`` for i = 0 .. n/2 - 1, shape (P,), slowed where the specification says so.

        A rotation that makes r turns within ``slowing_context`` keeps the share ``(r - low) / (high - low)``, within 0
        and 1, of its frequency; the rest is divided by ``slowing``.
        """
        spec = self.spec
        exponents = torch.arange(0, self.rotated, 2, dtype=torch.float32) / max(self.rotated, 1)
        plain_P = spec.base**-exponents / spec.scale
        if spec.slowing == 1:
            return plain_P
        turns_P = spec.slowing_context * plain_P / (2 * math.pi)
        kept_P = ((turns_P - spec.slowing_low) / (spec.slowing_high - spec.slowing_low)).clamp(0, 1)
        return plain_P * (kept_P + (1 - kept_P) / spec.slowing)

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables, each (B, 1, T, n) float32, the second half repeating the first."""
        angles_BTP = positions_BT[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles_BTP, angles_BTP), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``n = cos.shape[-1]`` channels, first half paired with second half; the rest passes through.

    ``y = x cos + rotate_half(x) sin`` with ``rotate_half(u, w) = (-w, u)``. Returned in the dtype of ``x``.
    """
    n = cos.shape[-1]
    if n < x_BHTC.shape[-1]:
        return x_BHTC if n == 0 else torch.cat((rotate(x_BHTC[..., :n], cos, sin), x_BHTC[..., n:]), dim=-1)
    first, second = wide(x_BHTC).chunk(2, dim=-1)
    return (x_BHTC * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHTC.dtype)
