"""Training with quantised weights: which ones, from when, and what they are replaced by at a step."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ouroboros.config import QuantizedTraining
from ouroboros.nn.quantize import noisy, quantized, straight_through
from ouroboros.optim import chosen_matrices


class Quantizer:
    """Puts quantised or noisy weights in the place of the chosen ones while a gradient is computed.

    Args:
        model: its parameters are chosen from.
        spec: which, from when and how.
        seed: of the run. Noise depends on it, the step and the parameter alone, so all processes and micro-batches
            have the same, and a resumed run has that of one that was not stopped.

    Raises:
        OuroborosError: a pattern that no two-dimensional parameter has, or no matrix at all.
    """

    def __init__(self, model: nn.Module, spec: QuantizedTraining, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.names = chosen_matrices(model, spec.where, "train.quantize")
        self.parameters = [model.get_parameter(name) for name in self.names]

    def acting(self, step: int, progress: float) -> AbstractContextManager[None]:
        """The context of the passes of ``step``, at ``progress`` in [0, 1] of the run."""
        spec = self.spec
        if progress < spec.start:
            return contextlib.nullcontext()
        return straight_through(self.parameters, self._noise(step) if spec.mode == "noise" else _rounding(spec))

    def _noise(self, step: int) -> functools.partial[Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        return functools.partial(noisy, bits=self.spec.bits, generator=generator)


def _rounding(spec: QuantizedTraining) -> functools.partial[Tensor]:
    return functools.partial(quantized, bits=spec.bits, clip=spec.clip, smallest=spec.smallest)
