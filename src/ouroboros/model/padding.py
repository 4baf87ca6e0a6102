"""Which positions are padding, told from any attention mask. For parts that let padded positions count as zero.

Shapes: B batch, T new positions, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding_of(mask: Tensor | None, tokens: int, past: int | Tensor) -> Tensor | None:
    """(B or 1, T), 1 where the new position is real; None when nothing is masked.

    Args:
        mask: (B, past + T) with 0 on padding; or (B or 1, 1 or H, T, S), boolean (True: attend) or additive, in which a
            padded position may not attend to itself.
        tokens: T.
        past: positions before the new ones.
    """
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask[:, -tokens:]
    at = torch.arange(tokens, device=mask.device)
    return _attends(mask)[:, at, at + past]


def leading_padding(mask: Tensor | None, tokens: int, past: int | Tensor) -> Tensor | None:
    """(B or 1,), how many of the first new positions are padding that no real one precedes; arguments as above."""
    padding = padding_of(mask, tokens, past)
    if mask is None or padding is None:
        return None
    if mask.ndim == 2:
        return (mask.long().cumsum(-1)[:, -tokens:] == 0).sum(-1)
    before = torch.arange(mask.shape[-1], device=mask.device) < past
    seen = (_attends(mask) & before).any(dim=(-2, -1))
    return (padding.long().cumsum(-1) == 0).sum(-1) * ~seen


def _attends(mask: Tensor) -> Tensor:
    """(B or 1, T, S), True where the first head may attend."""
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
