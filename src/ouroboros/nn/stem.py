"""Shipped stem parts: what is done to the token embeddings. Shapes: B batch, T positions, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts import stem as specs
from ouroboros.errors import OuroborosError, check
from ouroboros.nn.memory import with_recent
from ouroboros.nn.part import Init, Started
from ouroboros.nn.visit import VisitContext


class EmbeddingNorm(Started):
    """RMS norm without a gain. Has no parameters."""

    def __init__(self, spec: specs.EmbeddingNormSpec, model: ModelSpec) -> None:
        super().__init__()
        self.eps = model.block.norm.eps

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """Normalise (B, T, D)."""
        return nn.functional.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)


class EmbeddingScale(Started):
    """``y = a x`` with a fixed number, ``sqrt(D)`` by default (Vaswani et al. 2017, section 3.4). Has no parameters."""

    def __init__(self, spec: specs.EmbeddingScaleSpec, model: ModelSpec) -> None:
        super().__init__()
        self.factor = model.hidden_size**0.5 if spec.factor is None else spec.factor

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """(B, T, D) to the same."""
        return x_BTD * self.factor


class LearnedPositions(nn.Embedding):
    """Adds a vector for each position of the text, registers not counted."""

    def __init__(self, spec: specs.LearnedPositionsSpec, model: ModelSpec) -> None:
        super().__init__(model.max_position_embeddings, model.hidden_size)
        self.registers = model.registers

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:  # pyrefly: ignore
        """(B, T, D) to the same."""
        assert visit.positions is not None
        return x_BTD + super().forward(visit.positions - self.registers).to(x_BTD.dtype)


class Smear(Started):
    """``y_t = (1 - g) x_t + g x_{t-1}`` with ``g = sigmoid(gate)`` for each channel, ``x_{-1} = 0`` (the smear gate of
    modded-nanogpt)."""

    def __init__(self, spec: specs.SmearSpec, model: ModelSpec) -> None:
        super().__init__()
        self.start, self.boundary = spec.start, spec.boundary
        check_boundary(spec.kind, spec.boundary, model)
        self.gate = nn.Parameter(torch.empty(model.hidden_size))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The gate at its starting value."""
        nn.init.constant_(self.gate, self.start)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """(B, T, D) to the same.

        Raises:
            OuroborosError: there is a boundary, but embeddings were given instead of ids.
        """
        if visit.padding is not None:
            x_BTD = x_BTD * visit.padding[..., None].to(x_BTD.dtype)
        previous_BTD = with_recent(visit.memory, "smear", x_BTD, 1)[:, :-1]
        if self.boundary is not None:
            starts_BT = needed_ids("smear.boundary", ids_BT) == self.boundary
            previous_BTD = previous_BTD.masked_fill(starts_BT[..., None], 0)
        gate_D = torch.sigmoid(self.gate).to(x_BTD.dtype)
        return (1 - gate_D) * x_BTD + gate_D * previous_BTD


def check_boundary(kind: str, boundary: int | None, model: ModelSpec) -> None:
    """Refuse an end-of-text token that the vocabulary lacks.

    Raises:
        OuroborosError: names the option and the size of the vocabulary.
    """
    # The specification cannot tell: training sets the size of the vocabulary later.
    check(
        boundary is None or boundary < model.vocab_size,
        f"stem.{kind}.boundary is {boundary}, but the vocabulary has {model.vocab_size} tokens: give the id of the"
        " tokenizer's end-of-text token",
    )


def needed_ids(what: str, ids_BT: Tensor | None) -> Tensor:
    """The token ids of a part that cannot do without.

    Raises:
        OuroborosError: embeddings were given instead.
    """
    if ids_BT is None:
        raise OuroborosError(f"model.stem.{what} needs token ids: give input_ids, not inputs_embeds")
    return ids_BT
