"""The block: a mixer and a feed-forward network, each behind a norm and joined by a residual.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.nn.attention import Attention
from ouroboros.nn.delta import build_compressor
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.latent import BottleneckAttention, LatentAttention
from ouroboros.nn.memory import Memory
from ouroboros.nn.mixer import MixerInput
from ouroboros.nn.norm import build_norm
from ouroboros.nn.osam import Osam
from ouroboros.nn.residual import build_residual

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "attention": Attention,
    "latent_attention": LatentAttention,
    "bottleneck_attention": BottleneckAttention,
    "osam": Osam,
}
"""Mixer classes by ``spec.mixer.kind``: called with (x_BTD, MixerInput, Memory | None)."""


class Block(nn.Module):
    """``x = residual(x, mixer(norm x)); x = residual(x, ffn(norm x))``; knows no loop and no depth.

    With sandwich placement each sublayer's output is normalised once more before it joins the stream, with final
    placement nothing is. Without a feed-forward network the block is its first half.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, placement = spec.hidden_size, spec.norm.placement
        self.pre, self.sandwich = placement != "final", placement == "sandwich"
        self.has_mlp = spec.ffn.kind != "none"
        if self.pre:
            self.input_layernorm = build_norm(spec.norm, width)
        self.self_attn = MIXERS[spec.mixer.kind](spec.mixer, width, spec.norm.eps)
        if self.has_mlp:
            if self.pre:
                self.post_attention_layernorm = build_norm(spec.norm, width)
            self.mlp = FeedForward(spec.ffn, width)
        if self.sandwich:
            self.mixer_output_layernorm = build_norm(spec.norm, width)
            if self.has_mlp:
                self.mlp_output_layernorm = build_norm(spec.norm, width)
        self.compressor = build_compressor(spec)
        self.mixer_residual = build_residual(spec)
        if self.has_mlp:
            self.mlp_residual = build_residual(spec)

    def forward(self, x: Tensor, given: MixerInput, memory: Memory | None = None) -> Tensor:
        """One visit: the state (B, T, D), or an expanded one (B, T, V, D), to the same."""
        read_BTD = self._read(x, given, memory, "mixer")
        context = self.input_layernorm(read_BTD) if self.pre else read_BTD
        update = self.self_attn(context, given, memory)
        update = self.mixer_output_layernorm(update) if self.sandwich else update
        x = self.mixer_residual(x, update, context, read_BTD)
        if not self.has_mlp:
            return x
        read_BTD = self._read(x, given, memory, "mlp")
        context = self.post_attention_layernorm(read_BTD) if self.pre else read_BTD
        update = self.mlp(context)
        update = self.mlp_output_layernorm(update) if self.sandwich else update
        return self.mlp_residual(x, update, context, read_BTD)

    def output_projections(self) -> list[nn.Linear]:
        """The linear maps that write to the stream."""
        names = getattr(type(self.self_attn), "OUTPUT_PROJECTIONS", ("o_proj",))
        outputs = [getattr(self.self_attn, name) for name in names if hasattr(self.self_attn, name)]
        return [*outputs, self.mlp.down_proj] if self.has_mlp else outputs

    def _read(self, x: Tensor, given: MixerInput, memory: Memory | None, name: str) -> Tensor:
        """What a sublayer reads of the state: one vector of width D."""
        return x if self.compressor is None else self.compressor(x, memory, given.padding, name)
