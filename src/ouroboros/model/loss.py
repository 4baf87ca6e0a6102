"""What training asks of a model: the loss, without logits. Shapes: B batch, T positions, D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ouroboros.nn.head_loss import IGNORED, head_loss


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """``loss`` is what is minimised; there are no logits."""

    unsmoothed_loss: Tensor | None = None
    """The same without label smoothing and without gradient."""


def loss_output(head: nn.Module, matrix: nn.Linear, x_BTD: Tensor, targets_BT: Tensor, smoothing: float) -> LossOutput:
    """The mean loss of ``targets`` (-100 ignored), the tokens that follow each position.

    A head that says its ``scale`` and ``softcap`` is computed in chunks, see
    :func:`~ouroboros.nn.head_loss.head_loss`; any other is given all logits at once.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    scaling: Any = head
    if hasattr(head, "scale") and hasattr(head, "softcap"):
        objective, plain = head_loss(
            x_ND, matrix.weight, targets_N, smoothing=smoothing, scale=scaling.scale, softcap=scaling.softcap
        )
        return LossOutput(loss=objective, unsmoothed_loss=plain)
    objective, plain = logits_loss(head(matrix(x_ND)), targets_N, smoothing)
    return LossOutput(loss=objective, unsmoothed_loss=plain)


def logits_loss(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss in nats, in float32, of logits (..., V) and targets (...): with label smoothing, and without it and
    without gradient."""
    logits_NV, targets_N = logits.flatten(0, -2).float(), targets.flatten()
    plain = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED)
    if not smoothing:
        return plain, plain.detach()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, label_smoothing=smoothing), plain.detach()
