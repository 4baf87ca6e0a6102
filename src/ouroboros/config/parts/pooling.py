"""What a loop part sees of the state: each token by itself, or a mean over positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ouroboros.config.needs import needs
from ouroboros.config.part import LoopPart
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class PooledPart(LoopPart):
    """A loop part that makes what it hands of the state that begins a loop."""

    pooling: Literal["token", "prefix", "prompt", "all"] = "token"
    """What it sees of the state: the ``token`` itself, the mean of the ``prefix`` up to it, that mean held from the
    position ``prompt`` on, or the mean over ``all`` positions. The last is as published and not causal."""
    prompt: int = field(default=64, metadata=needs("pooling", "prompt"))
    """Tokens, from the beginning of the text, that the mean is taken over."""
    norm: bool = True
    """RMS-normalise the state that it sees, without a gain; the published form does not."""

    def __post_init__(self) -> None:
        check(self.prompt >= 1, f"loop.{self.kind}.prompt must be >= 1, got {self.prompt}")

    def check(self, model: ModelSpec) -> None:
        check(
            not (model.share_last_kv and self.remembers),
            f"loop.{self.kind}.pooling {self.pooling!r} remembers something in every loop, and share_last_kv keeps the"
            " last one's alone: leave one of them out",
        )

    def warnings(self, model: ModelSpec) -> Iterator[str]:
        if self.sees_later:
            yield f"{self.sees_later}; losses are no likelihoods, and generation sees another state than training"

    @property
    def sees_later(self) -> str:
        published = f"loop.{self.kind}.pooling 'all', as published, is not causal: it averages over later positions too"
        return published if self.pooling == "all" else ""

    @property
    def remembers(self) -> bool:
        """Whether a cache keeps the sum of what came before."""
        return self.pooling in ("prefix", "prompt")

    def matrices(self, width: int) -> int:
        """Numbers in weight matrices, which everything that is seen meets once."""
        raise NotImplementedError

    def flops(self, width: int, loops: int) -> int:
        return 0 if self.pooling == "all" else loops * 2 * self.matrices(width)

    def text_flops(self, width: int, loops: int) -> int:
        # The mean over all positions is one vector for the whole text.
        return loops * 2 * self.matrices(width) if self.pooling == "all" else 0

    def recent_values(self, width: int) -> int:
        return width if self.remembers else 0
