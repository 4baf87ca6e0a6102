"""Specifications: frozen dataclasses that describe a model, its data and its training.

A recipe is a Python value of type :class:`Recipe`. Every run, checkpoint and artifact carries its
resolved recipe as JSON (:func:`to_json`, :func:`from_json`); reading is strict: an unknown key, a wrong
type or a value out of range is an :class:`~ouroboros.errors.OuroborosError` that names the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ouroboros.config.codec import fields_by_path, from_dict, from_json, to_dict, to_json
from ouroboros.config.data import DataSpec, FilterSpec
from ouroboros.config.model import BlockOverride, BlockSpec, ModelSpec
from ouroboros.config.part import (
    FeedForwardPart,
    HeadPart,
    LoopPart,
    MixerPart,
    NormPart,
    Part,
    ResidualPart,
    StemPart,
    TopologyPart,
)
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec, NoFeedForwardSpec
from ouroboros.config.parts.norm import LayerNormSpec, RMSNormSpec
from ouroboros.config.parts.rope import RopeSpec
from ouroboros.config.train import (
    DistilledTraining,
    GuardedTraining,
    LoopTraining,
    LowRankTraining,
    OptimSpec,
    QuantizedTraining,
    TaughtTraining,
    TrainSpec,
)

__all__ = [
    "AttentionSpec",
    "BlockOverride",
    "BlockSpec",
    "DataSpec",
    "DistilledTraining",
    "FeedForwardPart",
    "FeedForwardSpec",
    "FilterSpec",
    "GuardedTraining",
    "HeadPart",
    "LayerNormSpec",
    "LoopPart",
    "LoopTraining",
    "LowRankTraining",
    "MixerPart",
    "ModelSpec",
    "NoFeedForwardSpec",
    "NormPart",
    "OptimSpec",
    "Part",
    "QuantizedTraining",
    "RMSNormSpec",
    "Recipe",
    "ResidualPart",
    "RopeSpec",
    "StemPart",
    "TaughtTraining",
    "TopologyPart",
    "TrainSpec",
    "fields_by_path",
    "from_dict",
    "from_json",
    "to_dict",
    "to_json",
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named system: a model and the way it is trained."""

    name: str
    description: str = ""
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
