"""The head that ships: logits scaled and capped. Shapes: V vocabulary, ``...`` the leading axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.head import LinearHeadSpec


class LinearHead(nn.Module):
    """``c tanh(a W x / c)``, given ``W x``. Has no parameters of its own.

    ``scale`` and ``softcap`` let training compute the loss in chunks, see :mod:`ouroboros.nn.head_loss`; a head without
    them is given all logits.
    """

    def __init__(self, spec: LinearHeadSpec, model: ModelSpec) -> None:
        super().__init__()
        self.scale, self.softcap = spec.logit_scale, spec.logit_softcap

    def forward(self, logits: Tensor) -> Tensor:
        """(..., V) to the same."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
