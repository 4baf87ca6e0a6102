"""The published settings as one of our models: prelude, one looped layer, coda, and what steers the loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ouroboros.config import LoopPart, ModelSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.loop import LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import ControllerSpec, StaticDiagonalsSpec, modulated
from ouroboros.errors import check

LOOP = "loop"
"""The name of the looped segment in layouts."""
DONOR = ("model.embed_tokens.*", "model.decoder.layers.*", "model.norm.*")
"""Names of what comes from the pretrained model, none of which the published program trains."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Which layers are kept, and the sizes of what steers the loop (section 2); the defaults are the published ones."""

    prelude: int = 8
    looped: int = 18
    """The number of the looped layer in the pretrained model."""
    coda: int = 8
    depth: int = 8
    """How often the looped layer is applied."""
    rank: int = 32
    alpha: float = 16.0
    style: int = 128
    steps: int = 64
    """Rows of the Controller's table of steps."""
    norm_steps: int = 64
    """Rows of the norm's gains."""
    static_rows: int | None = None
    """Rows of learned diagonals that stand in the Controller's place; None means the Controller."""
    halt_hidden: int | None = None
    """Width of the halting network; None means that all tokens take ``depth`` steps, else it is the most they take."""

    def model(self, donor: ModelSpec) -> ModelSpec:
        """The model made of a pretrained one, whose layout is a number of blocks.

        Raises:
            OuroborosError: the looped layer is not between prelude and coda, or layers differ.
        """
        layers = donor.schedule.num_blocks
        check(not donor.overrides, "the layers of the pretrained model are not alike, and a cut needs equal ones")
        check(
            self.prelude <= self.looped < layers - self.coda,
            f"the looped layer {self.looped} is not between prelude (layers before {self.prelude}) and coda (from"
            f" {layers - self.coda} of {layers} on): choose another",
        )
        steering: LoopPart = ControllerSpec(
            rank=self.rank, style=self.style, rows=self.steps, pooling="all", norm=False
        )
        if self.static_rows is not None:
            steering = StaticDiagonalsSpec(rank=self.rank, rows=self.static_rows)
        halting = () if self.halt_hidden is None else (HaltSpec(hidden=self.halt_hidden, freeze=False),)
        return modulated(
            dataclasses.replace(donor, layout=f"{self.prelude} {LOOP}:(1)x{self.depth} {self.coda}"),
            (steering, LoopNormSpec(rows=self.norm_steps, eps=1e-6), RecurrenceGateSpec(), *halting),
            rank=self.rank,
            alpha=self.alpha,
        )

    def sources(self, donor: ModelSpec) -> list[int]:
        """The layer of the pretrained model that each block is."""
        layers = donor.schedule.num_blocks
        return [*range(self.prelude), self.looped, *range(layers - self.coda, layers)]

    def removed(self, donor: ModelSpec) -> list[int]:
        """The layers that are no block of the model, of whose weights the bases are made."""
        kept = self.sources(donor)
        return [layer for layer in range(donor.schedule.num_blocks) if layer not in kept]
