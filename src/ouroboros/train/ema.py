"""Exponential moving average of the weights (Polyak & Juditsky 1992), evaluated and exported in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ouroboros.errors import check


class Ema:
    """A float32 average of a model's trainable weights, by parameter name; tied weights appear once.

    Args:
        model: its trainable parameters are averaged, starting from their present values.
        decay: in [0, 1). The first updates use ``(1 + n) / (10 + n)`` while that is less, n updates done, so that a
            short run's average is not dominated by the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check(0 <= decay < 1, f"train.ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        """Updates done; saved and given back to :meth:`load` on resume."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shadow = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call once after each optimiser step."""
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        present = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), present, weight)
        self.updates += 1

    @contextlib.contextmanager
    def swap(self) -> Iterator[None]:
        """Within the context the model has the averaged weights; afterwards its own, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._assign(self._shadow)
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        # In place: compiled blocks and data-parallel wrappers keep pointing at the same storage.
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32, not copied."""
        return dict(self._shadow)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what :meth:`state_tensors` and :attr:`updates` gave.

        Raises:
            OuroborosError: names or shapes differ from the model's.
        """
        missing, unexpected = sorted(self._shadow.keys() - tensors.keys()), sorted(tensors.keys() - self._shadow.keys())
        check(not missing and not unexpected, f"averaged weights: missing {missing}, unexpected {unexpected}")
        for name, average in self._shadow.items():
            shape, expected = tuple(tensors[name].shape), tuple(average.shape)
            check(shape == expected, f"averaged weights: {name} has shape {shape}, the model has {expected}")
        for name, average in self._shadow.items():
            average.copy_(tensors[name])
        self.updates = updates
