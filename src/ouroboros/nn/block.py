"""The block: a mixer and a feed-forward network, each behind a norm and joined by a residual.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.nn.attention import Attention, MixerInput
from ouroboros.nn.delta import build_compressor
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.latent import BottleneckAttention, LatentAttention
from ouroboros.nn.memory import Memory
from ouroboros.nn.norm import RMSNorm
from ouroboros.nn.residual import build_residual

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "attention": Attention,
    "latent_attention": LatentAttention,
    "bottleneck_attention": BottleneckAttention,
}
"""Mixer classes by ``spec.mixer.kind``: called with (x_BTD, MixerInput, Memory | None)."""


class Block(nn.Module):
    """``x = residual(x, mixer(norm x)); x = residual(x, ffn(norm x))``; knows no loop and no depth.

    With sandwich placement each sublayer's output is normalised once more before it joins the stream.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, eps = spec.hidden_size, spec.norm.eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = MIXERS[spec.mixer.kind](spec.mixer, width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = FeedForward(spec.ffn, width)
        self.sandwich = spec.norm.placement == "sandwich"
        if self.sandwich:
            self.mixer_output_layernorm = RMSNorm(width, eps)
            self.mlp_output_layernorm = RMSNorm(width, eps)
        self.compressor = build_compressor(spec)
        self.mixer_residual = build_residual(spec)
        self.mlp_residual = build_residual(spec)

    def forward(self, x: Tensor, given: MixerInput, memory: Memory | None = None) -> Tensor:
        """One visit: the state (B, T, D), or an expanded one (B, T, V, D), to the same."""
        read_BTD = self._read(x, given, memory, "mixer")
        context = self.input_layernorm(read_BTD)
        update = self.self_attn(context, given, memory)
        update = self.mixer_output_layernorm(update) if self.sandwich else update
        x = self.mixer_residual(x, update, context, read_BTD)
        read_BTD = self._read(x, given, memory, "mlp")
        context = self.post_attention_layernorm(read_BTD)
        update = self.mlp(context)
        update = self.mlp_output_layernorm(update) if self.sandwich else update
        return self.mlp_residual(x, update, context, read_BTD)

    def _read(self, x: Tensor, given: MixerInput, memory: Memory | None, name: str) -> Tensor:
        """What a sublayer reads of the state: one vector of width D."""
        return x if self.compressor is None else self.compressor(x, memory, given.padding, name)
