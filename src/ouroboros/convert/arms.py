"""What a healing compares: the forms that a cut donor may take, from no training at all to a Controller."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ouroboros.config import LoopPart, LowRankTraining, Recipe
from ouroboros.config.parts.loop import BridgeSpec, LoopGainSpec
from ouroboros.config.parts.modulated import ControllerSpec, StaticDiagonalsSpec

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

Name = Literal["bridge", "healed", "low-rank", "norms", "static", "controller"]
TRAINED: tuple[Name, ...] = ("healed", "low-rank", "static", "controller")
"""The arms that are trained unless others are asked for."""
BRIDGE_TOKENS = 32_768
"""Tokens that the bridge is fitted to unless another number is asked for."""
FROZEN = ("model.embed_tokens.*", "lm_head.*", "model.norm.*", "model.decoder.layers.*")
"""Names of what comes from the donor."""
MATRICES = "model.decoder.layers.*_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Sizes of what an arm adds to the donor's layers."""

    rank: int = 32
    """Of the bases that static diagonals and the Controller modulate."""
    alpha: float = 16.0
    """What is added is multiplied by ``alpha / rank``."""
    bases: Literal["mean", "joint", "stepwise"] = "mean"
    """Of what removed layers the bases are made, and how."""
    style: int = 128
    """Width of the Controller."""
    pooling: Literal["token", "prefix", "prompt", "all"] = "token"
    """What the Controller sees of the state."""
    low_rank: int = 2
    """Rank of the additions to all kept layers in the arm ``low-rank``. With 2 and the donor's usual shapes that arm
    trains about as many numbers as the one with a Controller."""

    def parts(self, arm: str, loops: int) -> tuple[LoopPart, ...]:
        """The loop parts of an arm: all have a bridge, and a gain for each loop where there are several."""
        steering: dict[str, tuple[LoopPart, ...]] = {
            "static": (StaticDiagonalsSpec(rank=self.rank),),
            "controller": (ControllerSpec(rank=self.rank, style=self.style, pooling=self.pooling),),
        }
        gain = (LoopGainSpec(form="channel"),) if loops > 1 else ()
        return (*steering.get(arm, ()), *gain, BridgeSpec())


def trained(recipe: Recipe, arm: str, steering: Steering, model: OuroborosForCausalLM) -> Recipe:
    """The recipe of an arm: what of the donor is trained in it, if anything, besides the loop parts."""
    names = [name for name, _ in model.named_parameters()]
    left_out: Sequence[str] = FROZEN
    train = recipe.train
    if arm == "low-rank":
        train = dataclasses.replace(train, low_rank=LowRankTraining(rank=steering.low_rank, where=(MATRICES,)))
        left_out = (*FROZEN[:-1], "model.decoder.layers.*norm*", "model.decoder.layers.*.bias")
    elif arm == "norms":
        left_out = (*FROZEN[:2], MATRICES)
    present = tuple(pattern for pattern in left_out if fnmatch.filter(names, pattern))
    return dataclasses.replace(
        recipe,
        name=f"heal-{arm}",
        model=model.config.model_spec,
        optim=dataclasses.replace(recipe.optim, left_out=present),
        train=train,
    )
