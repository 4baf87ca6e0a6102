"""Hashed n-gram embedding. Shapes: B batch, T positions, E width of the table, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.stem import NgramSpec
from ouroboros.nn.memory import with_recent
from ouroboros.nn.part import Init, Projection, Started
from ouroboros.nn.stem import check_boundary, needed_ids
from ouroboros.nn.visit import VisitContext

MULTIPLIERS = (36313, 27191, 51497)
"""Of a token's id, of the one before it and of the one before that. The first two are published, the third is ours."""
SCALE_START = 0.05


class Ngram(Started):
    """``x_t + s P A[hash(id_t, id_{t-1})]``, with trigrams ``x_t + s P (A[hash of two] + A[hash of three])``.

    The table A starts at zero, which is neutral, and learns from the first step because P does not. The source is the
    bigram embedding of openai/parameter-golf; its products are 32 bits wide and overflow above a vocabulary of 59,138,
    where ours are exact.
    """

    PARAMETER_ROLES = {"scale": "scalar"}

    def __init__(self, spec: NgramSpec, model: ModelSpec) -> None:
        super().__init__()
        check_boundary(spec.kind, spec.boundary, model)
        self.buckets, self.boundary = spec.buckets, spec.boundary
        self.lengths = (2, 3) if spec.trigram else (2,)
        self.table = _Table(spec.buckets, spec.width)
        if spec.width != model.hidden_size:
            self.proj = Projection(spec.width, model.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The scale at its starting value; what is inside starts by itself."""
        nn.init.constant_(self.scale, SCALE_START)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """(B, T, D) to the same.

        Raises:
            OuroborosError: embeddings were given instead of ids.
        """
        # Counted from 1, so that 0 is where no token was. A cache keeps 32 bits, hashes take 64.
        marks_BT = needed_ids("ngram", ids_BT).int() + 1
        if visit.padding is not None:
            marks_BT = marks_BT * visit.padding.to(marks_BT.dtype)
        longer = with_recent(visit.memory, "ngram", marks_BT, self.lengths[-1] - 1)
        e_BTE = self.table(torch.stack([self.hashes(longer, length) for length in self.lengths])).sum(dim=0)
        added_BTD = self.proj(e_BTE) if hasattr(self, "proj") else e_BTE
        return x_BTD + (self.scale * added_BTD).to(x_BTD.dtype)

    def hashes(self, longer: Tensor, length: int) -> Tensor:
        """The row of the table for the last ``length`` tokens at each position, int64 (B, T).

        With ``m = buckets - 1`` it is the exclusive or of each token's id times its multiplier, modulo m; and m itself
        where the document has fewer tokens so far.

        Args:
            longer: ids + 1, (B, T + ``self.lengths[-1]`` - 1): those of the T tokens behind what came before them, 0
                where nothing was.
            length: tokens that are hashed together.
        """
        size = longer.shape[1] - self.lengths[-1] + 1
        at = [longer[:, self.lengths[-1] - 1 - back :][:, :size].long() for back in range(length)]
        hashed, known = MULTIPLIERS[0] * (at[0] - 1), torch.ones_like(at[0], dtype=torch.bool)
        for back in range(1, length):
            hashed = hashed ^ (MULTIPLIERS[back] * (at[back] - 1))
            known = known & (at[back] > 0)
            if self.boundary is not None:
                known = known & (at[back - 1] != self.boundary + 1)
        return torch.where(known, hashed % (self.buckets - 1), self.buckets - 1)


class _Table(Started, nn.Embedding):
    """Rows that start at zero."""

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)
