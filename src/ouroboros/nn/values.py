"""A table of values that attention adds to its own.

Shapes: B batch, T positions, D model width, W width of the table, E values of all key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.errors import check
from ouroboros.nn.part import Init, Projection, Started
from ouroboros.nn.visit import VisitContext


class ValueEmbedding(Started):
    """Looks up ``s P e(id)`` for blocks that ask for it, and leaves the stream as it is; P only where widths differ.

    The table starts at a standard deviation of 0.01 and the factor ``s`` at 0.1, as published.
    """

    PARAMETER_ROLES = {"scale": "scalar"}

    def __init__(self, spec: ValueEmbeddingSpec, model: ModelSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(model.vocab_size, spec.width)
        values = spec.values(model)
        self.proj = None if spec.width == values else Projection(spec.width, values, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def reset_parameters(self, init: Init | None = None) -> None:
        """The factor, and the table, whose rows are smaller than other embeddings."""
        nn.init.constant_(self.scale, 0.1)
        if init is not None:
            nn.init.normal_(self.embed.weight, std=0.01)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """The stream; what was looked up, (B, T, E), is carried as ``values``.

        Raises:
            OuroborosError: there are embeddings instead of ids.
        """
        check(
            ids_BT is not None, "a model with stem.value_embedding looks tokens up: give input_ids, not inputs_embeds"
        )
        assert visit.carried is not None and ids_BT is not None
        found = self.embed(ids_BT)
        visit.carried["values"] = self.scale.to(x_BTD.dtype) * (found if self.proj is None else self.proj(found))
        return x_BTD
