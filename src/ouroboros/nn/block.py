"""The block: a mixer and a feed-forward network, each behind a norm and joined by a residual.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ouroboros.config import BlockSpec
from ouroboros.config.part import build, module_of
from ouroboros.nn.visit import VisitContext


class Block(nn.Module):
    """``x = residual(x, mixer(norm x)); x = residual(x, ffn(norm x))``; knows no loop and no depth.

    With sandwich placement each sublayer's output is normalised once more before it joins the stream, with final
    placement nothing is. Without a feed-forward network the block is its first half.

    Args:
        spec: its parts.
        width: of the stream, D.
    """

    def __init__(self, spec: BlockSpec, width: int) -> None:
        super().__init__()
        placement = spec.norm.placement
        self.pre, self.sandwich = placement != "final", placement == "sandwich"
        self.has_mlp = not spec.ffn.absent
        if self.pre:
            self.input_layernorm = build(spec.norm, width)
        self.self_attn = build(spec.mixer, width, spec.norm.eps)
        if self.has_mlp:
            if self.pre:
                self.post_attention_layernorm = build(spec.norm, width)
            self.mlp = build(spec.ffn, width)
        if self.sandwich:
            self.mixer_output_layernorm = build(spec.norm, width)
            if self.has_mlp:
                self.mlp_output_layernorm = build(spec.norm, width)
        self.entrance = module_of(spec.residual).entrance(spec.residual, width)
        self.compressor = module_of(spec.residual).reader(spec.residual, width)
        self.mixer_residual = build(spec.residual, width, spec.dropout)
        if self.has_mlp:
            self.mlp_residual = build(spec.residual, width, spec.dropout)

    def forward(self, x: Tensor, visit: VisitContext) -> Tensor:
        """One visit: the state (B, T, D), or an expanded one (B, T, V, D), to the same."""
        if self.entrance is not None:
            x = self.entrance(x, visit)
        if visit.other is not None and self.pre:
            visit = visit._replace(other=self.input_layernorm(visit.other))
        read_BTD = self._read(x, visit, "mixer")
        context = self.input_layernorm(read_BTD) if self.pre else read_BTD
        update = self.self_attn(context, visit)
        update = self.mixer_output_layernorm(update) if self.sandwich else update
        x = self.mixer_residual(x, update, context, read_BTD)
        if not self.has_mlp:
            return x
        read_BTD = self._read(x, visit, "mlp")
        context = self.post_attention_layernorm(read_BTD) if self.pre else read_BTD
        update = self.mlp(context, visit)
        update = self.mlp_output_layernorm(update) if self.sandwich else update
        return self.mlp_residual(x, update, context, read_BTD)

    def output_projections(self) -> list[nn.Linear]:
        """The linear maps that write to the stream."""
        sublayers = [self.self_attn, *([self.mlp] if self.has_mlp else [])]
        named = [(layer, name) for layer in sublayers for name in getattr(layer, "OUTPUT_PROJECTIONS", ("o_proj",))]
        return [getattr(layer, name) for layer, name in named if hasattr(layer, name)]

    def _read(self, x: Tensor, visit: VisitContext, name: str) -> Tensor:
        """What a sublayer reads of the state: one vector of width D."""
        return x if self.compressor is None else self.compressor(x, visit.memory, visit.padding, name)
