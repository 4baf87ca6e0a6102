"""Which layers blocks are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

from ouroboros.config import ModelSpec
from ouroboros.convert.families import spec_of
from ouroboros.convert.layers import chosen, cut, groups, initial, listed, named, removed, split
from ouroboros.errors import OuroborosError
from ouroboros.schedule import parse


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("0-2,4", ((0,), (1,), (2,), (4,))),
        ("0,1+2,3", ((0,), (1, 2), (3,))),
        ("0,1+2-4+6,7-8", ((0,), (1, 2, 3, 4, 6), (7,), (8,))),
        ("3,2,2", ((3,), (2,), (2,))),
        ("0+1,2+3", ((0, 1), (2, 3))),
    ],
)
def test_lists_are_read_and_written(text: str, kept: Any) -> None:
    assert named(text, 9, len(kept)) == kept
    assert named(listed(kept), 9, len(kept)) == kept


def test_a_mean_of_neighbours_is_not_written_as_a_range_of_blocks() -> None:
    assert listed(((0,), (1,), (2, 3, 4), (5,))) == "0-1,2+3-4,5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1+", r"--keep: '' is no number of a block"),
        ("0,1+9", r"--keep: '9' is not within 0-8"),
        ("0,1+0-2", r"--keep: '1\+0-2' has a layer twice in one mean"),
        ("0,1+2,3", r"lists 3 blocks, the model has 2"),
    ],
)
def test_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        named(text, 9, 2)


def test_published_layers_are_the_middle_ones() -> None:
    """8, 18, 8 of 36, and its analogue of 30 layers: section 2.1 of the specification."""
    for layers, middle in ((36, 18), (30, 15)):
        kept = initial("stepwise", parse("8 (1)x4 8"), layers)
        assert kept == tuple((layer,) for layer in (*range(8), middle, *range(layers - 8, layers)))


def test_stepwise_and_averaged() -> None:
    assert initial("stepwise", parse("1 (3)x2 1"), 12)[1:-1] == ((2,), (5,), (9,))
    assert initial("averaged", parse("1 (3)x2 1"), 12)[1:-1] == ((1, 2, 3), (4, 5, 6), (7, 8, 9, 10))
    assert initial("averaged", parse("(1)x2"), 3) == ((0, 1, 2),)
    assert initial("stepwise", parse("1 (2)x2 1"), 4) == ((0,), (1,), (2,), (3,))


def test_more_groups_than_items_share() -> None:
    assert groups("abc", 5) == ["a", "a", "b", "b", "c"]
    assert [len(run) for run in groups(range(14), 4)] == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("3", r"layout '3' has no loop whose layers could be chosen: write one loop"),
        ("1 (1)x2 1 (1)x2", "more than a prelude, one loop and a coda"),
        ("a:1 (1)x2 a", "more than a prelude, one loop and a coda"),
        ("3 (1)x2 2", r"has 6 blocks and the donor 5 layers: take fewer blocks"),
    ],
)
def test_layouts_that_leave_nothing_to_choose(layout: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        split(parse(layout), 5)


def gemma() -> ModelSpec:
    """Four layers, the second and the fourth of which see all tokens."""
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        sliding_window_pattern=2,
    )
    return spec_of(config)


def test_blocks_keep_the_kind_of_their_layers() -> None:
    donor = gemma()
    kept = cut(donor, "(2)x2 1", ((1,), (3,), (2,)))
    assert kept.layout == "(2)x2 1" and [block.mixer.looks_back for block in kept.blocks] == [None, None, 16]
    assert list(kept.blocks) == [donor.blocks[layer] for layer in (1, 3, 2)]
    assert cut(donor, "4", tuple((layer,) for layer in range(4))).blocks == donor.blocks
    assert cut(donor, "(1)x2", ((0, 2),)).blocks == (donor.blocks[0],)
    with pytest.raises(OuroborosError, match=r"layers 0 and 1 differ in mixer.rope.base, mixer.window: only layers of"):
        cut(donor, "(1)x2", ((0, 1),))


def test_means_are_taken_in_float32() -> None:
    """Of unrelated layers they are smaller than each."""
    tensors = {f"model.decoder.layers.{n}.x": torch.randn(50, 50).bfloat16() for n in range(4)} | {"y": torch.ones(1)}
    found = chosen(tensors, ((1,), (0, 1, 2, 3)))
    assert found.keys() == {"y", "model.decoder.layers.0.x", "model.decoder.layers.1.x"}
    assert found["model.decoder.layers.0.x"].equal(tensors["model.decoder.layers.1.x"])
    mean = found["model.decoder.layers.1.x"]
    assert mean.dtype == torch.float32 and float(mean.std()) == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(mean, sum(tensors[f"model.decoder.layers.{n}.x"].float() for n in range(4)) / 4)


def test_layers_of_a_mean_are_removed() -> None:
    assert removed(((0,), (1, 2), (4,)), 5) == [1, 2, 3]
