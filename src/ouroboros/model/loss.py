"""What training asks of a model: the loss, without logits. Shapes: B batch, T positions, D model width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ouroboros.config import ModelSpec
from ouroboros.nn.head_loss import head_loss


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """``loss`` is what is minimised; there are no logits."""

    unsmoothed_loss: Tensor | None = None
    """The same without label smoothing and without gradient."""


def loss_output(spec: ModelSpec, head: nn.Linear, x_BTD: Tensor, targets_BT: Tensor, smoothing: float) -> LossOutput:
    """The mean loss of ``targets`` (-100 ignored), the tokens that follow each position; see
    :func:`~ouroboros.nn.head_loss.head_loss`."""
    objective, plain = head_loss(
        x_BTD.flatten(0, 1),
        head.weight,
        targets_BT.flatten(),
        smoothing=smoothing,
        scale=spec.logit_scale,
        softcap=spec.logit_softcap,
    )
    return LossOutput(loss=objective, unsmoothed_loss=plain)
