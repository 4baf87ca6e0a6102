"""What training asks of a model: the loss, without logits, and what parts add to it.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ouroboros.nn.head_loss import IGNORED, head_loss


@dataclass
class StatesOutput(BaseModelOutputWithPast):
    """Final states."""

    auxiliary_loss: Tensor | None = None
    """What parts add to the loss in training; None: nothing."""


@dataclass
class LogitsOutput(CausalLMOutputWithPast):
    """Logits; ``loss`` is what is minimised, with the auxiliary loss."""

    auxiliary_loss: Tensor | None = None
    """What parts add to the loss in training; None: nothing."""


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """``loss`` is what is minimised, with what parts add to it; there are no logits."""

    unsmoothed_loss: Tensor | None = None
    """The next-token loss, without label smoothing, without what parts add, and without gradient."""


def plus(loss: Tensor, auxiliary: Tensor | None) -> Tensor:
    """What is minimised: ``loss`` and what parts add to it, if they do."""
    return loss if auxiliary is None else loss + auxiliary


def loss_output(
    head: nn.Module,
    matrix: nn.Linear,
    x_BTD: Tensor,
    targets_BT: Tensor,
    smoothing: float,
    auxiliary: Tensor | None = None,
) -> LossOutput:
    """The mean loss of ``targets`` (-100 ignored), the tokens that follow each position, and what parts add to it.

    A head that says its ``scale`` and ``softcap`` is computed in chunks, see
    :func:`~ouroboros.nn.head_loss.head_loss`; any other is given all logits at once.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    scaling: Any = head
    if hasattr(head, "scale") and hasattr(head, "softcap"):
        objective, plain = head_loss(
            x_ND, matrix.weight, targets_N, smoothing=smoothing, scale=scaling.scale, softcap=scaling.softcap
        )
    else:
        objective, plain = logits_loss(head(matrix(x_ND)), targets_N, smoothing)
    return LossOutput(loss=plus(objective, auxiliary), unsmoothed_loss=plain)


def logits_loss(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss in nats, in float32, of logits (..., V) and targets (...): with label smoothing, and without it and
    without gradient."""
    logits_NV, targets_N = logits.flatten(0, -2).float(), targets.flatten()
    plain = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED)
    if not smoothing:
        return plain, plain.detach()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, label_smoothing=smoothing), plain.detach()
