"""The table of values that the published crawler stores and never reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.nn.part import Init
from ouroboros.nn.values import ValueEmbedding
from ouroboros.nn.visit import VisitContext
from ouroboros.systems.crawler.parts import UnconnectedValuesSpec


class UnconnectedValues(ValueEmbedding):
    """Parameters without a use."""

    PARAMETER_ROLES = {"scale": "scalar", "factors": "scalar"}

    def __init__(self, spec: UnconnectedValuesSpec, model: ModelSpec) -> None:
        super().__init__(spec, model)
        self.factors = nn.Parameter(torch.ones(spec.factors))

    def reset_parameters(self, init: Init | None = None) -> None:
        """As published."""
        super().reset_parameters(init)
        if hasattr(self, "factors"):
            nn.init.ones_(self.factors)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """The stream."""
        return x_BTD
