"""Exponential moving average of the weights (Polyak & Juditsky 1992), evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ouroboros.train.state import copy_tensors


class Ema(AveragedModel):
    """The average of a model's weights, as a model of its own in ``module``; tied weights stay tied.

    Args:
        model: its weights are averaged, starting from their present values.
        decay: in [0, 1). The first updates use ``(1 + n) / (10 + n)`` while that is less, n updates done, so that a
            short run's average is not dominated by the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def move(averages: list[Tensor], present: list[Tensor], count: Tensor) -> None:
            done = int(count) - 1
            torch._foreach_lerp_(averages, present, 1.0 - min(decay, (1 + done) / (10 + done)))

        super().__init__(model, multi_avg_fn=move)  # pyrefly: ignore
        # torch copies the weights of the first update instead of averaging; here the start counts as that update.
        self.updates = 0

    @property
    def updates(self) -> int:
        """Updates done; saved and given back to :meth:`load` on resume."""
        return int(self.n_averaged) - 1

    @updates.setter
    def updates(self, count: int) -> None:
        self.n_averaged.fill_(count + 1)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages of the trainable weights by their names in the model, not copied."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what :meth:`state_tensors` and :attr:`updates` gave; ``model`` has all that is not averaged.

        Raises:
            OuroborosError: names or shapes differ from the model's.
        """
        self.module.load_state_dict(model.state_dict())
        copy_tensors(self.state_tensors(), tensors, "averaged weights")
        self.updates = updates
