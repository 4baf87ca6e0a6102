"""Sliding windows: what a visit that sees the last tokens alone may attend to.

Caches keep all keys, so a window is a mask. Shapes: B batch, T new tokens, S keys, R registers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_positions(positions: Tensor, keys: int, past: int | Tensor, registers: int) -> Tensor:
    """Positions (B or 1, R + S) of all keys, registers counted and first.

    Args:
        positions: of the new tokens in the text, (B or 1, T).
        keys: S, those of the text.
        past: how many of them precede the call.
        registers: R.
    """
    T, at = positions.shape[-1], positions
    if keys != T:
        # A cache is filled without gaps, so the position of the last token tells those of all keys.
        at = positions[:, -1:] - (past + T - 1) + torch.arange(keys, device=positions.device)
    before = torch.arange(registers, device=positions.device).expand(at.shape[0], registers)
    return torch.cat((before, at.clamp(min=0) + registers), dim=1)


def within(mask: Tensor | None, window: int | None, at: Tensor, keys_at: Tensor, registers: int) -> Tensor | None:
    """``mask`` without the keys that stand ``window`` tokens or more before a token; registers are always seen.

    Args:
        mask: (B, 1, T, R + S), boolean or additive; None: plain causal.
        window: tokens that a token sees, itself included; None: all, and the mask stays.
        at: positions of the new tokens, (B or 1, T), registers counted.
        keys_at: positions of all keys, (B or 1, R + S).
        registers: R.
    """
    if window is None or (mask is None and keys_at.shape[-1] <= window):
        return mask
    query, key = at[:, None, :, None], keys_at[:, None, None, :]
    seen = (key > query - window) | (key < registers)
    if mask is None:
        return seen & (key <= query)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
