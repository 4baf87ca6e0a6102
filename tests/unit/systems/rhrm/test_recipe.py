"""R-HRM's presets: the published sizes and schedule, and names that everything else expects."""

from __future__ import annotations

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.recipes import SIZES, presets, recipe, sizes
from ouroboros.systems.rhrm.recipe import rhrm, rhrm_published


def test_presets_are_published_ones() -> None:
    shapes = {}
    for size in ("lite", "pro", "beast"):
        made = rhrm_published(size)
        model, train = made.model, made.train
        loops = int(model.layout.removeprefix("(1)x"))
        rows = train.batch_size // train.accumulation
        shapes[size] = (rows, made.data.sequence_length, loops, model.hidden_size, model.block.mixer.num_heads)
        assert model.block.ffn.intermediate_size == 4 * model.hidden_size and model.registers == 5
        assert (model.head.logit_scale, model.register_std, train.target_loss) == (0.1, 1.0, 2.1)
    assert shapes == {"lite": (4, 128, 4, 256, 4), "pro": (16, 256, 8, 512, 8), "beast": (32, 256, 12, 768, 12)}


def test_both_recipes_have_the_same_shapes() -> None:
    for size in sizes("rhrm"):
        ours, published = rhrm(size).model, rhrm_published(size).model
        assert (ours.layout, ours.hidden_size, ours.block.mixer.num_heads) == (
            published.layout,
            published.hidden_size,
            published.block.mixer.num_heads,
        )


def test_sizes_of_the_contract_name_presets() -> None:
    assert sizes("rhrm") == ("tiny", "lite", "pro", "beast") and sizes("gpt") == SIZES
    assert recipe("rhrm", "small") == recipe("rhrm", "lite") and recipe("rhrm", "base") == recipe("rhrm", "pro")
    assert {size for size, _ in presets("rhrm")} <= set(sizes("rhrm")) and presets("rhrm")[-1][1] == 0
    assert presets("rhrm-published") == presets("rhrm") and presets("gpt") == ()
    with pytest.raises(OuroborosError, match=r"unknown size 'best'; did you mean 'beast'\?"):
        recipe("rhrm", "best")
