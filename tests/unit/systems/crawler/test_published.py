"""Settings of the published program: names, layouts, numbers of blocks, parts, exact counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouroboros.accounting import cost
from ouroboros.config.parts.helix import HelixSpec, SplitAttentionSpec
from ouroboros.config.parts.tap import TapSpec
from ouroboros.config.parts.topology import ChainSpec, UNetSpec
from ouroboros.errors import OuroborosError
from ouroboros.systems.crawler.published import Published, helix_layout

SUBMISSION = Published(
    num_flat_layers=9,
    crawler_mlp_mult=6.0,
    crawler_loop_rope_scales=(9.0, 1.0),
    qk_gain_init=4.0,
    keep_unconnected=True,
)


def submission(**changes: Any) -> Published:
    return dataclasses.replace(SUBMISSION, **changes)


def test_exact_counts_of_the_submission() -> None:
    """With three loops one more map of instructions; dead are the table of values and, untrained, the instructions."""
    assert cost(SUBMISSION.model()).parameters == 26_253_908
    assert cost(submission(crawler_loops=3).model()).parameters == 26_270_292
    alive = submission(keep_unconnected=False)
    assert cost(SUBMISSION.model()).parameters - cost(alive.model()).parameters == 163_843
    instructions = cost(alive.model()).parameters - cost(dataclasses.replace(alive, inst_dim=0).model()).parameters
    assert instructions == 49_152 - 2 * 512, "without them there is a fixed vector for each loop"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_flat_layer": 3}, r"settings: unknown key 'num_flat_layer'; did you mean 'num_flat_layers'\?"),
        ({"num_heads": "many"}, "settings: num_heads: .*integer"),
        ({"num_heads": 0}, "settings: num_heads must be >= 1, got 0"),
        ({"num_heads": 7}, r"model_dim \(512\) must be a multiple of num_heads \(7\)"),
        ({"helix_stride": 0}, "helix_stride must be >= 1"),
        ({"num_flat_layers": -1}, "num_flat_layers must be >= 0, got -1"),
        ({"mlp_act": "gelu"}, "mlp_act: .*'relu_sq'"),
        ({"crawler_mlp_choke_shape": "round"}, "crawler_mlp_choke_shape: .*'pyramid_res'"),
        ({"crawler_cannon_type": "loud"}, "crawler_cannon_type: .*'rmsnorm'"),
        ({"ve_layers": "9,ten"}, "ve_layers must be numbers of blocks as in '9,10', got '9,ten'"),
        ({"crawler_tap_layers": "most"}, "crawler_tap_layers must be numbers of blocks as in '9,10', got 'most'"),
        ({"dtg": True}, "dtg: no published result used it, and it is not read here"),
    ],
    ids=str,
)
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OuroborosError, match=words) as caught:
        Published.read(settings)
    assert "\n" not in str(caught.value)


def test_read() -> None:
    read = Published.read({"crawler_loop_rope_scales": [9, 1, 1], "dtg": False, "f1_corr_rank": 0, "mlp_mult": 3})
    assert read == Published(crawler_loop_rope_scales=(9, 1, 1))


@pytest.mark.parametrize(
    ("settings", "layout", "flats", "shared"),
    [
        ({"num_flat_layers": 9}, "4 crawler:(1)x2 5", [0, 1, 2, 3, 5, 6, 7, 8, 9], [4]),
        ({"num_flat_layers": 4, "num_crawler_layers": 2}, "2 crawler:(2)x2 2", [0, 1, 4, 5], [2, 3]),
        ({"num_flat_layers": 1}, "crawler:(1)x2 1", [1], [0]),
        ({"num_flat_layers": 0}, "crawler:(1)x2", [], [0]),
        ({"num_layers": 5}, "5", [0, 1, 2, 3, 4], []),
        ({"flat_weight_share": True}, "outer:1 inner:1 crawler:(1)x2 inner outer", [0, 1], [2]),
        ({"helix_enabled": True, "num_flat_layers": 2}, "1 crawler:1 1 crawler", [0, 2], [1]),
        ({"helix_enabled": True, "num_flat_layers": 5, "helix_stride": 2}, "2 crawler:1 2 crawler 1", [0, 1, 3], [2]),
        (
            {"helix_enabled": True, "num_flat_layers": 2, "helix_cross_attn": True, "num_crawler_layers": 2},
            "1 up:1 down:1 crawler:2 1 up down crawler",
            [0, 5],
            [3, 4],
        ),
    ],
    ids=str,
)
def test_layouts_and_numbers_of_blocks(
    settings: dict[str, Any], layout: str, flats: list[int], shared: list[int]
) -> None:
    """Of the flat blocks the first ones; the schedule says which the shared ones are."""
    published = Published(**settings)
    assert published.layout == layout
    assert [published.flat_block(index) for index in range(len(flats))] == flats
    assert [published.shared_block(index) for index in range(published.shared)] == shared
    schedule = published.model().schedule
    named = [block for s in schedule.stored if s.name == "crawler" for block in s.blocks]
    assert named == shared and schedule.notation == layout


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(OuroborosError, match="flat_weight_share is for num_flat_layers 4, got 5"):
        assert Published(flat_weight_share=True, num_flat_layers=5).layout
    with pytest.raises(OuroborosError, match="layout '2' has"):
        Published(helix_enabled=True, num_flat_layers=2, helix_stride=3).model()
    assert helix_layout(3, 1, 1, name="s") == "1 s:1 1 s 1 s"


def test_what_single_blocks_have() -> None:
    """Depths in the program's own order; XSA, chokes and divisors on the shared blocks alone."""
    model = SUBMISSION.model()
    assert [block.norm.depth for block in model.blocks] == [1, 2, 3, 4, 10, 5, 6, 7, 8, 9]
    assert [block.ffn.hidden_width for block in model.blocks] == [1536] * 4 + [3072] + [1536] * 5
    assert [getattr(block.mixer, "exclusive", None) for block in model.blocks] == [False] * 4 + [True] + [False] * 5
    ropes = [block.mixer.rotary(512)[0] for block in model.blocks]  # pyrefly: ignore
    assert ropes[4].loop_scales == (9, 1) and ropes[4].original_context is None
    assert ropes[0].loop_scales == () and ropes[0].original_context == 1024
    even = submission(crawler_loop_rope_scales=(1, 1, 1)).model()
    assert even.blocks[4].mixer.rotary(512) == even.blocks[0].mixer.rotary(512), "the divisors are off"
    plain = Published(num_layers=11, ve_layers="9,10", xsa_last_n=4).model()
    assert [getattr(block.mixer, "exclusive", None) for block in plain.blocks] == [False] * 7 + [True] * 4
    assert [getattr(block.mixer, "value_embedding", None) for block in plain.blocks] == [False] * 9 + [True] * 2
    bare = Published(ln_scale=False).model()
    assert {block.norm.depth for block in bare.blocks} == {None} and not bare.block.norm.depth_scale


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["flow"]),
        ({"inst_dim": 0}, ["embedding"]),
        ({"crawler_loops": 1, "anchor_dim": 4}, []),
        (
            {"anchor_dim": 4, "crawler_loop_smear": True, "crawler_tap_dim": 4, "contractive_dt": 0.5},
            ["flow", "loop_smear", "anchor", "tap", "contractive"],
        ),
        ({"crawler_cannon_type": "rmsnorm", "inst_dim": 0, "crawler_loops": 1}, ["gain"]),
        ({"helix_enabled": True, "anchor_dim": 4}, []),
        ({"num_layers": 4}, []),
    ],
    ids=str,
)
def test_parts_of_the_loop(settings: dict[str, Any], kinds: list[str]) -> None:
    assert [part.kind for part in Published(**settings).model().loop] == kinds


@pytest.mark.parametrize(
    ("layers", "tap"),
    [
        ("all", TapSpec(width=4)),
        ("deep", TapSpec(width=4, layers="deepest")),
        ("shallow", TapSpec(width=4, layers="first")),
        ("1, 0", TapSpec(width=4, blocks=(1, 0))),
    ],
)
def test_tapped_blocks(layers: str, tap: TapSpec) -> None:
    published = Published(crawler_tap_dim=4, crawler_tap_layers=layers, inst_dim=0, crawler_loops=1)
    assert published.model().loop == (tap,)


def test_topologies() -> None:
    assert Published().model().topology == UNetSpec() and Published(num_flat_layers=1).model().topology == ChainSpec()
    linear = Published(helix_enabled=True, helix_dim=7, helix_merge_cap=0.4, helix_fire_embed=True).model().topology
    expected = HelixSpec(stream="crawler", merge="sigmoid", bridge_width=7, merge_cap=0.4, visit_embedding="halves")
    assert linear == expected
    crossed = Published(helix_enabled=True, helix_dim=7, helix_cross_attn=True, cross_heads=99).model()
    assert isinstance(crossed.topology, HelixSpec) and crossed.topology.bridges == "attention"
    mixers = [block.mixer for block in crossed.blocks]
    assert [mixer.kind for mixer in mixers[1:4]] == ["cross", "cross", "split"]
    assert isinstance(mixers[3], SplitAttentionSpec) and mixers[3].cross_heads == 8
    assert mixers[3].query_gain == 1.5 and mixers[3].qk_norm == "before_rope", "the rest is as in other blocks"
