"""The delta recipes: the published sizes, and what the shipped ones change."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ouroboros.accounting import cost
from ouroboros.recipes import recipe, sizes
from ouroboros.systems.delta.config import OuroborosConfig


def test_recipes_have_the_published_sizes() -> None:
    for name in ("delta", "delta-published"):
        assert sizes(name) == ("tiny", "small", "published", "medium")
        assert recipe(name, "base") == recipe(name, "published")
        assert cost(recipe(name, "published").model).parameters == 123_627_312
        assert cost(recipe(name, "medium").model).parameters == 353_606_752
    assert recipe("delta-published", "published").model == OuroborosConfig().spec


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_additive_twin_is_the_plain_decoder(size: str) -> None:
    """Parts and training are those of ``gpt``: what differs is the query/key norm and the start."""
    ours, plain = recipe("delta", size), recipe("gpt", size)
    changed = {"block", "mixer", "residual", "embedding_std", "init_std", "output_init"}
    for our, their in ((ours.model, plain.model), (ours.model.block, plain.model.block)):
        for field in dataclasses.fields(their):
            same = getattr(our, field.name) == getattr(their, field.name)
            assert same == (field.name not in changed), field.name
    assert dataclasses.replace(ours.model.block.mixer, qk_norm="none", head_dim=None) == plain.model.block.mixer
    assert (ours.data, ours.optim, ours.train) == (plain.data, plain.optim, plain.train)


def test_the_shipped_recipe_differs_where_the_published_one_is_at_fault() -> None:
    ours, published = recipe("delta", "published").model, recipe("delta-published", "published").model
    our, their = ours.block, published.block
    assert (our.mixer.qk_norm, their.mixer.qk_norm) == ("before_rope", "after_rope")
    assert (our.norm.eps, their.norm.eps) == (1e-6, 1e-5)
    assert (our.residual.compressor_init, their.residual.compressor_init) == ("average", "normal")
    assert ours.init_std == published.init_std == 0.5 / math.sqrt(768)
