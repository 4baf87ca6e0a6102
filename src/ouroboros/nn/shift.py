"""Mixing of a projection with the previous token's (token shift of keys and values).

Shapes: B batch, T positions, D model width, K heads, C channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.nn.memory import Memory, with_recent
from ouroboros.nn.small import SmallLinear


class TokenShift(nn.Module):
    """``y_t = a_t u_{t-1} + (1 - a_t) u_t`` per head, ``a = sigmoid(W x)``, ``u_{-1} = 0``.

    Every length is treated alike, so that feeding tokens one by one gives what one pass gives; the published code
    returns a single token as it is.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.proj = SmallLinear(hidden_size, heads)

    def forward(
        self, u_BTKC: Tensor, x_BTD: Tensor, memory: Memory | None, padding_BT: Tensor | None, name: str
    ) -> Tensor:
        """(B, T, K, C) to the same.

        Args:
            u_BTKC: the projection.
            x_BTD: what it was made from.
            memory: remembers the last ``u`` under ``name``.
            padding_BT: 1 where the token is real; padded positions count as zero.
            name: of this use within the memory.
        """
        if padding_BT is not None:
            u_BTKC = u_BTKC * padding_BT[..., None, None].to(u_BTKC.dtype)
        previous = with_recent(memory, name, u_BTKC, 1)[:, :-1]
        a_BTK1 = torch.sigmoid(self.proj(x_BTD))[..., None]
        return a_BTK1 * previous + (1 - a_BTK1) * u_BTKC
