"""The delta residual: along one direction erase what is there and write a value (Deep Delta Learning, 2601.00417).

Shapes: B batch, T positions, D model width, V value channels, K taps. A state of one value channel is (B, T, D), of
several (B, T, V, D): the width stays last, so that norms and loop parts act on each channel by itself. ``...`` stands
for the leading axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.nn.delta_kernel import CausalMix, DeltaUpdate, inverse_length, wide
from ouroboros.nn.memory import Memory, with_recent
from ouroboros.nn.part import Init, Projection, Residual, Started
from ouroboros.nn.small import SmallLinear

SATURATION = 1e-6
"""Gate probabilities at the start stay this far from 0 and 1, where a logit would be infinite."""


def gate_bias(beta_init: float) -> float:
    """The logit of ``beta_init / 2``, clamped: -13.8 for 0, 0 for 1, 13.8 for 2."""
    share = min(max(beta_init / 2, SATURATION), 1 - SATURATION)
    return math.log(share / (1 - share))


class Gate(nn.Module):
    """``b = 2 sigmoid(w . c + bias)``, or ``2 sigmoid(w_2 . tanh(W_1 c) + bias)``; (..., D) to (..., 1), float32."""

    def __init__(self, spec: DeltaSpec, hidden_size: int) -> None:
        super().__init__()
        inner = hidden_size
        if spec.gate == "two_layer":
            self.hidden_proj = Projection(hidden_size, spec.gate_hidden, bias=False)
            inner = spec.gate_hidden
        start = gate_bias(spec.beta_init)
        self.proj = SmallLinear(inner, 1, bias=(start, start))

    def forward(self, context: Tensor) -> Tensor:
        """The gate in (0, 2) of the normalised input (..., D)."""
        if hasattr(self, "hidden_proj"):
            context = torch.tanh(_linear(self.hidden_proj, context))
        return 2 * torch.sigmoid(_linear(self.proj, context))


class DeltaResidual(Residual):
    """``X' = X + b k (v - k.X)`` with ``k`` the direction of the sublayer's output (sections 2 and 3 of the paper).

    ``b`` comes from the sublayer's normalised input and ``v`` from the raw one, as in the published code. Sums and
    products are float32, whatever the stream's dtype; the result is cast once. A sublayer that returns exactly 0 leaves
    the state as it is.
    """

    def __init__(self, spec: DeltaSpec, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Gate(spec, hidden_size)
        if spec.value != "constant":
            bound = hidden_size**-0.5
            self.value_proj = SmallLinear(hidden_size, spec.values, bias=(-bound, bound))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    @classmethod
    def start(cls, spec: DeltaSpec, width: int) -> nn.Module | None:
        """An expanded state is made of the embeddings."""
        return Expansion(spec, width) if spec.expanded else None

    @classmethod
    def reader(cls, spec: DeltaSpec, width: int) -> nn.Module | None:
        """An expanded state is compressed to one vector."""
        if not spec.expanded:
            return None
        return {"channel": ChannelCompressor, "token": TokenCompressor}[spec.compressor](spec, width)

    def forward(self, x: Tensor, update_BTD: Tensor, context_BTD: Tensor, read_BTD: Tensor) -> Tensor:
        """Join ``update`` to the state.

        Args:
            x: the state, (B, T, D) or (B, T, V, D).
            update_BTD: the sublayer's output, of which the direction alone counts.
            context_BTD: what the sublayer read, normalised.
            read_BTD: the same before the norm: the state, or what the compressor made of it.
        """
        update = update_BTD if self.dropout is None else self.dropout(update_BTD)
        spec, beta, value = self.spec, self.gate(context_BTD), self._value(read_BTD)
        state = x if spec.expanded else x.unsqueeze(-2)
        state = DeltaUpdate.apply(state, update, beta, value, spec.guard, spec.eps, spec.erase)
        return state if spec.expanded else state.squeeze(-2)

    def terms(self, update_BTD: Tensor, context_BTD: Tensor, read_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The direction ``k`` (..., D), the gate ``b`` (..., 1) and the target ``v`` (..., V), float32."""
        return direction(wide(update_BTD), self.spec), self.gate(context_BTD), self._value(read_BTD)

    def _value(self, read_BTD: Tensor) -> Tensor:
        """The target (..., V), float32."""
        spec = self.spec
        if spec.value == "constant":
            return wide(read_BTD.new_full((*read_BTD.shape[:-1], spec.values), spec.value_constant))
        logits = _linear(self.value_proj, read_BTD)
        return spec.value_scale * torch.sigmoid(logits) if spec.value == "sigmoid" else logits


def direction(h: Tensor, spec: DeltaSpec) -> Tensor:
    """``h`` (..., D) at unit length, guarded: 0 stays 0."""
    return h * inverse_length(h, spec.guard, spec.eps)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` in float32, also where lower precision is the rule."""
    with torch.autocast(x.device.type, enabled=False):
        x = wide(x)
        weight, bias = layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
        if layer.out_features > 1 or not torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        # Compiled, this joins the loops around it; a matrix product would write its gradient, an outer product, apart.
        y = torch.mv(x.reshape(-1, x.shape[-1]), weight[0]).view(*x.shape[:-1], 1)
        return y if bias is None else y + bias


class ChannelCompressor(Started):
    """Reads one width-D vector of an expanded state: a short filter along the value channels, then a sum (CC).

    With the filter folded into the sum: ``y_i = sum_u W_iu X_ui``, ``W_iu = sum_j read_j w_i,u-j+p``,
    ``p = (K - 1) // 2``. Starts as the mean of the channels.
    """

    PARAMETER_ROLES = {"weight": "vector", "read": "vector"}

    def __init__(self, spec: DeltaSpec, hidden_size: int) -> None:
        super().__init__()
        self.values, self.kernel = spec.values, spec.kernel
        self.weight = nn.Parameter(torch.empty(hidden_size, spec.kernel))
        self.read = nn.Parameter(torch.empty(spec.values))
        self.drawn = spec.compressor_init == "normal"
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """One tap passes a channel through, and the channels are averaged."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[:, (self.kernel - 1) // 2])
        nn.init.constant_(self.read, 1 / self.values)
        if init is not None and self.drawn:
            nn.init.normal_(self.weight, std=init.std)

    def folded(self) -> Tensor:
        """``W`` (D, V), float32."""
        V, K, start = self.values, self.kernel, (self.kernel - 1) // 2 + 1
        reads_VK = F.pad(wide(self.read), (K, K)).unfold(0, K, 1)[start : start + V].flip(1)
        return (reads_VK[..., None] * wide(self.weight).T).sum(1).T

    def forward(self, x_BTVD: Tensor, memory: Memory | None, padding_BT: Tensor | None, name: str) -> Tensor:
        """(B, T, V, D) to (B, T, D); needs no memory."""
        weight_VD = self.folded().T
        return CausalMix.apply(x_BTVD, weight_VD[None, None]).squeeze(2).to(x_BTVD.dtype)


class TokenCompressor(Started):
    """Reads one width-D vector of an expanded state: a causal filter over tokens for each channel, then a sum (TC).

    ``y_t,i = sum_j read_j sum_s w_s,j,i X_(t-K+1+s),j,i``. Starts as the mean of the channels of the present token.
    """

    PARAMETER_ROLES = {"weight": "vector", "read": "vector"}

    def __init__(self, spec: DeltaSpec, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.kernel, spec.values, hidden_size))
        self.read = nn.Parameter(torch.empty(spec.values))
        self.drawn = spec.compressor_init == "normal"
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The last tap passes the present token through, and the channels are averaged."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[-1])
        nn.init.constant_(self.read, 1 / self.read.numel())
        if init is not None and self.drawn:
            nn.init.normal_(self.weight, std=init.std)

    def forward(self, x_BTVD: Tensor, memory: Memory | None, padding_BT: Tensor | None, name: str) -> Tensor:
        """(B, T, V, D) to (B, T, D).

        Args:
            x_BTVD: the state.
            memory: remembers the last K - 1 states under ``name``.
            padding_BT: 1 where the token is real; padded states count as zero.
            name: of this use within the memory.
        """
        weight_KVD = self.weight * self.read[:, None]
        return causal_taps(x_BTVD, weight_KVD[:, None], memory, padding_BT, name).squeeze(2)


class Expansion(Started):
    """The start of an expanded state: copies of the embedding, or per channel a causal filter over embeddings (EC).

    The filter starts as a copy.
    """

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, spec: DeltaSpec, hidden_size: int) -> None:
        super().__init__()
        self.values = spec.values
        if spec.embedding_conv:
            self.weight = nn.Parameter(torch.empty(spec.embedding_kernel, spec.values, hidden_size))
            self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The last tap is 1."""
        if hasattr(self, "weight"):
            nn.init.zeros_(self.weight)
            nn.init.ones_(self.weight[-1])

    def forward(self, e_BTD: Tensor, memory: Memory | None, padding_BT: Tensor | None) -> Tensor:
        """(B, T, D) to (B, T, V, D)."""
        if not hasattr(self, "weight"):
            return e_BTD[..., None, :].expand(*e_BTD.shape[:-1], self.values, e_BTD.shape[-1])
        return causal_taps(e_BTD[..., None, :], self.weight[:, :, None], memory, padding_BT, "expand")


def causal_taps(x: Tensor, weight_KVUD: Tensor, memory: Memory | None, padding_BT: Tensor | None, name: str) -> Tensor:
    """``y_t,v = sum_s sum_u w_s,v,u X_(t-K+1+s),u``, zeros before the start; (B, T, U, D) to (B, T, V, D)."""
    if padding_BT is not None:
        x = x * padding_BT[..., None, None].to(x.dtype)
    longer = with_recent(memory, name, x, weight_KVUD.shape[0] - 1)
    return CausalMix.apply(longer, weight_KVUD).to(x.dtype)
