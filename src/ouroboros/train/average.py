"""Averages of the weights along the run, evaluated and exported in their place.

Exponential (Polyak and Juditsky 1992), or the plain mean of the weights after every so many steps at the end of the run
(stochastic weight averaging, Izmailov et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ouroboros.config import TrainSpec
from ouroboros.train.state import copy_tensors


class Average(AveragedModel):
    """The average of a model's weights, as a model of its own in ``module``; tied weights stay tied.

    The first weights that are averaged are copied, so that those before, such as the random start, do not count. Those
    after ``n`` others move the average by ``1 - d`` of the difference, where ``d`` is ``ema_decay``, but at most
    ``(1 + n) / (10 + n)``: a young average is one of the last tenth of its life, not of all. The plain mean moves by
    ``1 / (n + 1)``.

    Args:
        model: its weights are averaged.
        spec: says how, how often, and from when.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec) -> None:
        decay = spec.ema_decay

        def move(averages: list[Tensor], present: list[Tensor], count: Tensor) -> None:
            done = int(count)
            share = 1.0 - min(decay, (1 + done) / (10 + done)) if decay else 1.0 / (done + 1)
            torch._foreach_lerp_(averages, present, share)

        super().__init__(model, multi_avg_fn=move)  # pyrefly: ignore
        self._every, self._begin = max(spec.average_every, 1), spec.averages_from

    def follow(self, model: nn.Module, step: int, progress: float) -> None:
        """Count in the weights after ``step`` steps, at ``progress`` in [0, 1] of the run, if they are to be."""
        if progress >= self._begin and step % self._every == 0:
            self.update_parameters(model)

    @property
    def updates(self) -> int:
        """Weights that were averaged; saved and given back to :meth:`load` on resume."""
        return int(self.n_averaged)

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
        self.n_averaged.fill_(updates)
