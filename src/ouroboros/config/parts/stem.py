"""What is done to the token embeddings before the first visit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import StemPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.ngram:Ngram")
@dataclass(frozen=True, kw_only=True)
class NgramSpec(StemPart):
    """Adds a learned vector for the last two tokens, which a hash finds in a small table; zero at the start."""

    kind: Literal["ngram"] = "ngram"
    buckets: int = 2048
    """Rows of the table. Pairs of tokens with the same hash share one; the last is for tokens without a past."""
    width: int = 128
    """Columns of the table. Another number than ``hidden_size`` adds a learned map to it."""
    trigram: bool = False
    """Also look up the last three tokens, in the same table."""
    boundary: int | None = None
    """The id of the end-of-text token, before which no token is looked at, so that documents in one sequence do not
    mix: 256 with the tokenizer ``bytes``, the last id with ``chars`` and ``bpe:N``, ``eos_token_id`` of any other. None
    mixes them, as published."""

    def __post_init__(self) -> None:
        check(self.buckets >= 2, f"stem.ngram.buckets must be >= 2, got {self.buckets}")
        check(self.width >= 1, f"stem.ngram.width must be >= 1, got {self.width}")
        _check_boundary(self.kind, self.boundary)

    def parameters(self, model: ModelSpec) -> int:
        mapped = self.width * model.hidden_size if self.width != model.hidden_size else 0
        return self.buckets * self.width + mapped + 1

    def flops(self, model: ModelSpec) -> int:
        return 2 * self.width * model.hidden_size if self.width != model.hidden_size else 0

    def recent_values(self, width: int) -> int:
        return 2 if self.trigram else 1


@part(module="ouroboros.nn.stem:EmbeddingNorm")
@dataclass(frozen=True, kw_only=True)
class EmbeddingNormSpec(StemPart):
    """RMS norm of the token embeddings, without a gain."""

    by_token: ClassVar[bool] = True

    kind: Literal["norm"] = "norm"


@part(module="ouroboros.nn.stem:LearnedPositions")
@dataclass(frozen=True, kw_only=True)
class LearnedPositionsSpec(StemPart):
    """A learned vector for each of ``max_position_embeddings`` positions, added to the embeddings; mixers then rotate
    nothing."""

    replaces_rotary: ClassVar[bool] = True

    kind: Literal["positions"] = "positions"

    def parameters(self, model: ModelSpec) -> int:
        return model.max_position_embeddings * model.hidden_size

    def longest(self, model: ModelSpec) -> int | None:
        return model.max_position_embeddings


@part(module="ouroboros.nn.stem:Smear")
@dataclass(frozen=True, kw_only=True)
class SmearSpec(StemPart):
    """Mixes every token with the one before it: ``(1 - g) x_t + g x_{t-1}``, with a learned ``g = sigmoid(gate)`` for
    each channel."""

    kind: Literal["smear"] = "smear"
    start: float = 0.0
    """The gate before its sigmoid, at the start: 0 mixes both in equal parts, as published; at -20 tokens stay as they
    are to seven digits, and an already trained model can learn to mix them."""
    boundary: int | None = None
    """The id of the end-of-text token, which is not mixed with what stands before it, so that documents in one sequence
    stay apart: 256 with the tokenizer ``bytes``, the last id with ``chars`` and ``bpe:N``, ``eos_token_id`` of any
    other. None mixes them, as published."""

    def __post_init__(self) -> None:
        _check_boundary(self.kind, self.boundary)

    def parameters(self, model: ModelSpec) -> int:
        return model.hidden_size

    def recent_values(self, width: int) -> int:
        return width


@part(module="ouroboros.nn.stem:EmbeddingScale")
@dataclass(frozen=True, kw_only=True)
class EmbeddingScaleSpec(StemPart):
    """Multiplies the token embeddings by one number."""

    by_token: ClassVar[bool] = True

    kind: Literal["scale"] = "scale"
    factor: float | None = None
    """The number; None means the square root of ``hidden_size``."""


def _check_boundary(kind: str, boundary: int | None) -> None:
    check(boundary is None or boundary >= 0, f"stem.{kind}.boundary must be a token id or null, got {boundary}")
