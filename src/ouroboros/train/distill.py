"""The last phase of a run: its weights learn from a frozen copy of their own average.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config import DistilledTraining
from ouroboros.model.loss import logits_loss
from ouroboros.nn.head_loss import IGNORED
from ouroboros.train.state import copy_tensors, model_tensors


def divergence(found_NV: Tensor, wanted_NV: Tensor, temperature: float) -> Tensor:
    """``KL(teacher || student)`` of logits, each divided by the temperature: nats, the mean over positions."""
    found, wanted = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (found_NV, wanted_NV))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


class Teacher:
    """A model that does not learn any more, and the loss of another one against it.

    Args:
        model: what it is a copy of.
        spec: temperature, and the share of the text's own loss.
    """

    def __init__(self, model: nn.Module, spec: DistilledTraining) -> None:
        self.spec = spec
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)

    def losses(
        self, logits_BTV: Tensor, inputs_BT: Tensor, targets_BT: Tensor, *, loops: int | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """``a CE + (1 - a) T^2 KL(teacher || student)`` in nats per token (Hinton et al. 2015), and the plain CE.

        Args:
            logits_BTV: of the student.
            inputs_BT: what both are shown.
            targets_BT: the tokens that follow, -100 where nothing is learned, from the teacher neither.
            loops: the loop count of both.
            smoothing: of the labels of CE.
        """
        objective, plain = logits_loss(logits_BTV, targets_BT, smoothing)
        with torch.no_grad():
            wanted_BTV = self.model(input_ids=inputs_BT, use_cache=False, loops=loops).logits
        learned, share, T = targets_BT != IGNORED, self.spec.alpha, self.spec.temperature
        apart = divergence(logits_BTV[learned], wanted_BTV[learned], T)
        return share * objective + (1.0 - share) * T**2 * apart, plain

    def state_tensors(self) -> dict[str, Tensor]:
        """Its weights by name, not copied."""
        return model_tensors(self.model)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave.

        Raises:
            OuroborosError: names or shapes differ.
        """
        copy_tensors(self.state_tensors(), tensors, "the weights of the teacher")
