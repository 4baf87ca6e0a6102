"""Topologies: how visits are wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import TopologyPart, part


@part(module="ouroboros.nn.topology:Chain")
@dataclass(frozen=True, kw_only=True)
class ChainSpec(TopologyPart):
    """Blocks one after the other; looped segments repeat, with loop parts at their boundaries."""

    kind: Literal["chain"] = "chain"
