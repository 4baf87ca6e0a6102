"""Linear maps to a few numbers."""

from __future__ import annotations

from torch import nn

from ouroboros.nn.part import Init, Projection, Started, ZeroProjection


class ZeroLinear(ZeroProjection):
    """:class:`ZeroProjection` to a few numbers: too flat to orthogonalise, so the optimiser treats it as vectors."""

    PARAMETER_ROLES = {"weight": "vector", "bias": "vector"}


class SmallLinear(Started, Projection):
    """A linear map to a few numbers: too flat to orthogonalise, so the optimiser treats it as vectors."""

    PARAMETER_ROLES = {"weight": "vector", "bias": "vector"}

    def __init__(self, inputs: int, outputs: int, bias: tuple[float, float] | None = None) -> None:
        """Biases start uniformly in the range ``bias``; None leaves them out. Weights are drawn with all others."""
        super().__init__(inputs, outputs, bias=bias is not None)
        self.bias_range = bias
        self._reset_bias()

    def reset_parameters(self, init: Init | None = None) -> None:
        """Weights as every matrix, biases in their range."""
        if init is None:  # while it is built
            nn.Linear.reset_parameters(self)
            return
        nn.init.normal_(self.weight, std=init.std)
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias_range is not None:
            nn.init.uniform_(self.bias, *self.bias_range)
