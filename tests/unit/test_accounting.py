"""Costs by hand; the harness proves them against built models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.accounting import Cost, cached_blocks, cost, describe, training_flops
from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    FeedForwardSpec,
    LayerNormSpec,
    LoopPart,
    LoopTraining,
    ModelSpec,
    NoFeedForwardSpec,
    RMSNormSpec,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import LatentAttentionSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe

D, V, F = 8, 11, 20
SPEC = ModelSpec(layout="1 (2)x3 1", vocab_size=V, hidden_size=D).replace(
    mixer=AttentionSpec(num_heads=4, num_kv_heads=2), ffn=FeedForwardSpec(intermediate_size=F)
)
BLOCK = D * D + 2 * D * 4 + D * D + 3 * D * F + 2 * D  # q, k and v (2 heads of 2), o, swiglu, norms


def change(**changes: Any) -> ModelSpec:
    return SPEC.replace(**changes)


def test_training_operations_are_a_mean_over_loop_counts() -> None:
    def forward(loops: int) -> int:
        return cost(SPEC, context=9, loops=loops).flops_per_token

    def trained(**loops: Any) -> int:
        return training_flops(SPEC, LoopTraining(**loops), 9)

    assert trained() == 3 * forward(3) == cost(SPEC, context=9).training_flops_per_token
    assert trained(sampling="uniform", min=1, max=4) == 3 * sum(map(forward, (1, 2, 3, 4))) / 4
    assert trained(curriculum=((0.0, 1), (0.25, 3))) == 3 * (forward(1) + 3 * forward(3)) / 4
    assert trained(backprop=1) == forward(3) + 2 * forward(1)
    assert trained(sampling="poisson", mean=1.0) == 3 * forward(1)
    plain = SPEC.replace(layout="2")
    assert training_flops(plain, LoopTraining(sampling="uniform"), 9) == 3 * cost(plain, context=9).flops_per_token


def test_parameters() -> None:
    total = cost(SPEC)
    assert total.embedding_parameters == V * D
    assert total.parameters == V * D + 4 * BLOCK + D
    assert cost(change(tie_embeddings=False)).embedding_parameters == 2 * V * D
    assert cost(change(norm=RMSNormSpec(placement="sandwich"))).parameters == total.parameters + 4 * 2 * D
    assert cost(change(registers=5)).parameters == total.parameters + 5 * D
    free = change(stem=(EmbeddingNormSpec(),), head=LinearHeadSpec(logit_scale=2.0), dropout=0.1)
    assert cost(free).parameters == total.parameters
    learned = change(stem=(LearnedPositionsSpec(),), max_position_embeddings=13)
    assert cost(learned).parameters == total.parameters + 13 * D


def test_parameters_of_mixer_options() -> None:
    base = cost(SPEC).parameters
    for option, added in (
        ({"qkv_bias": True}, 8 + 4 + 4),
        ({"out_bias": True}, 8),
        ({"qk_norm": "after_rope"}, 2 + 2),
        ({"query_gain": 1.0}, 4),
        ({"k_shift": True}, 2 * D),
        ({"k_shift": True, "v_shift": True}, 2 * 2 * D),
        ({"head_norm": True}, 2),
        ({"output_gate": True}, D * D + 2),
        ({"output_gate": True, "head_norm": True}, D * D + 2),
        ({"q_activation": "silu", "k_activation": "relu"}, 0),
    ):
        assert cost(change(mixer=dataclasses.replace(SPEC.block.mixer, **option))).parameters == base + 4 * added, (
            option
        )


def test_published_sizes_of_latent_attention() -> None:
    """R-HRM's presets: parameters, and numbers cached per token over all loops, in the three ways of keeping them."""
    for size, parameters, full, latents, decoupled in (
        ("lite", 13_804_160, 2_048, 256, 384),
        ("pro", 29_475_968, 8_192, 1_024, 1_280),
        ("beast", 47_015_552, 18_432, 2_304, 2_688),
    ):
        published = recipe("rhrm-published", size).model
        assert cost(published).parameters == parameters
        assert cost(published).cache_values_per_token == full
        kept = published.replace(mixer=dataclasses.replace(published.block.mixer, cache="latent"))
        assert cost(kept).cache_values_per_token == latents
        assert cost(recipe("rhrm", size).model).cache_values_per_token == decoupled


def test_deepseek_v2_keeps_576_numbers() -> None:
    mixer = LatentAttentionSpec(num_heads=128, head_dim=128, kv_rank=512, query_rank=1536, rope_dim=64)
    v2 = ModelSpec(layout="1", hidden_size=5120).replace(mixer=mixer)
    assert cost(v2).cache_values_per_token == 576


@pytest.mark.parametrize(
    ("ffn", "expected"),
    [
        (FeedForwardSpec(kind="swiglu", intermediate_size=F, bias=True), 3 * D * F + 2 * F + D),
        (FeedForwardSpec(kind="gelu", intermediate_size=F, bias=True), 2 * D * F + F + D),
        (FeedForwardSpec(kind="relu2", intermediate_size=F), 2 * D * F),
    ],
)
def test_parameters_of_feed_forward(ffn: FeedForwardSpec, expected: int) -> None:
    assert cost(change(ffn=ffn)).parameters - cost(SPEC).parameters == 4 * (expected - 3 * D * F)


@pytest.mark.parametrize(
    ("loop", "per_segment"),
    [
        (LoopNormSpec(), 3 * D),
        (LoopEmbeddingSpec(rows=7), 7 * D),
        (InjectionSpec(mode="add"), D),
        (InjectionSpec(mode="concat"), 2 * D * D),
        (RecurrenceGateSpec(), 2 * D * D + D),
        (ContractiveStepSpec(), 0),
    ],
    ids=str,
)
def test_parameters_of_loop_parts(loop: LoopPart, per_segment: int) -> None:
    assert cost(change(loop=(loop,))).parameters == cost(SPEC).parameters + per_segment
    assert cost(change(loop=(loop,), layout="4")).parameters == cost(SPEC).parameters
    assert cost(change(loop=(loop,), share_last_kv=True)).parameters == cost(SPEC).parameters + per_segment


def test_flops() -> None:
    context = 10
    visit = 2 * (2 * D * D + 2 * D * 4 + 3 * D * F) + 4 * context * D
    assert cost(SPEC, context=context).flops_per_token == 8 * visit + 2 * V * D
    assert cost(SPEC, context=context, loops=5).flops_per_token == 12 * visit + 2 * V * D
    assert cost(change(registers=3), context=7).flops_per_token == 8 * visit + 2 * V * D
    assert cost(SPEC, context=context).training_flops_per_token == 3 * (8 * visit + 2 * V * D)
    gated = cost(change(loop=(InjectionSpec(mode="concat"), RecurrenceGateSpec())), context=context)
    assert gated.flops_per_token == 8 * visit + 2 * V * D + 3 * (4 * D * D + 4 * D * D)


def test_cache() -> None:
    assert cost(SPEC).cache_values_per_token == 8 * 2 * 4
    assert cost(SPEC).cache_bytes_per_token() == 8 * 2 * 4 * 4
    assert cost(SPEC).cache_bytes_per_token(2) == 8 * 2 * 4 * 2
    assert cost(SPEC, loops=1).cache_values_per_token == 4 * 2 * 4
    shared = change(share_last_kv=True)
    assert cost(shared, loops=99).cache_values_per_token == 4 * 2 * 4
    assert cached_blocks(SPEC, SPEC.schedule) == [0, 1, 2, 1, 2, 1, 2, 3]
    assert cached_blocks(shared, SPEC.schedule) == [0, 1, 2, 3]
    assert cost(SPEC).state_bytes() == 0
    assert cost(change(residual=DeltaSpec(values=4))).state_values == 0
    assert Cost(1, 1, 1, 3, 0, 5, 1).state_bytes(2) == 10


def test_a_shift_remembers_the_last_key_or_value() -> None:
    assert SPEC.block.mixer.recent_values(D) == LatentAttentionSpec().recent_values(D) == 0
    for shifts in ({"k_shift": True}, {"k_shift": True, "v_shift": True}):
        mixer = dataclasses.replace(SPEC.block.mixer, **shifts)
        assert mixer.recent_values(D) == len(shifts) * 2 * 2
        assert cost(change(mixer=mixer)).state_values == 8 * len(shifts) * 2 * 2
        assert cost(change(mixer=mixer)).cache_values_per_token == cost(SPEC).cache_values_per_token


def test_state_of_filters_over_tokens() -> None:
    """At the published sizes of the delta residual; per visit, so that loops add to it."""
    token = DeltaSpec(values=4, compressor="token")
    spec = change(layout="12", hidden_size=768, mixer=AttentionSpec(num_heads=6), residual=token)
    assert cost(spec).state_values == (2 * 12 + 1) * 3 * 768 * 4 == 230_400
    both = spec.replace(residual=dataclasses.replace(token, embedding_conv=True))
    assert cost(both).state_values == 230_400 + 3 * 768
    assert cost(both.replace(layout="(6)x2")).state_values == cost(both).state_values
    assert cost(both.replace(layout="(6)x2"), loops=1).state_values == (2 * 6 + 1) * 3 * 768 * 4 + 3 * 768
    shared = both.replace(layout="(6)x9", share_last_kv=True)
    assert cost(shared).state_values == cost(both.replace(layout="6")).state_values
    for stateless in (DeltaSpec(), DeltaSpec(values=4), AdditiveResidualSpec()):
        assert cost(both.replace(residual=stateless)).state_values == 0


def test_state_of_shifts() -> None:
    for shifts in (0, 1, 2):
        mixer = AttentionSpec(num_heads=4, num_kv_heads=2, k_shift=shifts > 0, v_shift=shifts > 1)
        assert cost(change(mixer=mixer)).state_values == 8 * shifts * 2 * 2


def test_loop_maps_meet_every_value_channel() -> None:
    loop = (InjectionSpec(mode="concat"), RecurrenceGateSpec())
    more = [
        cost(change(loop=loop, **given)).flops_per_token - cost(change(**given)).flops_per_token
        for given in ({}, {"residual": DeltaSpec()}, {"residual": DeltaSpec(values=3)})
    ]
    assert more == [3 * 8 * D * D, 3 * 8 * D * D, 3 * 3 * 8 * D * D]


@given(st.integers(1, 30), st.integers(1, 30))
def test_loops_add_arithmetic_and_cache_in_proportion_but_no_parameters(few: int, more: int) -> None:
    one, a, b = (cost(SPEC, loops=n) for n in (1, few, more))
    assert one.parameters == a.parameters == b.parameters
    step = cost(SPEC, loops=2).flops_per_token - one.flops_per_token
    assert b.flops_per_token - a.flops_per_token == (more - few) * step
    assert (b.cache_values_per_token - a.cache_values_per_token) == (more - few) * 2 * 2 * 4


def test_a_plain_layout_has_no_other_loop_count() -> None:
    with pytest.raises(OuroborosError, match="has no loop"):
        cost(change(layout="3"), loops=2)


def test_drawing() -> None:
    text = describe(SPEC, context=100)
    total = cost(SPEC, context=100)
    assert "layout 1 (2)x3 1: 4 blocks, 8 visits" in text
    assert "[1]-[2]" in text and "x 3" in text
    for number in (total.parameters, total.flops_per_token, total.training_flops_per_token):
        assert f"{number:,}" in text
    assert f"{total.cache_bytes_per_token():,}" in text and "8 entries" in text
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "[0]-..-[39]" in describe(change(layout="40"))


def test_blocks_that_differ() -> None:
    """Parameters by block, operations and cache by visit."""
    spec = change(
        layout="1 wide:(2)x3 1",
        overrides=(
            BlockOverride(where="wide", set={"ffn.intermediate_size": 2 * F, "mixer.num_kv_heads": 4}),
            BlockOverride(where="0", set={"mixer.k_shift": True}),
            BlockOverride(where="3", set={"mixer": {"kind": "osam", "buckets": 9}}),
        ),
    )
    wide, shift = 2 * D * (8 - 4) + 3 * D * F, D * 2  # of one block
    memory = OsamSpec(buckets=9)
    attention = BLOCK - 3 * D * F - 2 * D
    assert cost(spec).parameters == cost(SPEC).parameters + 2 * wide + shift + memory.parameters(D) - attention
    assert cost(spec).cache_values_per_token == (1 * 2 * 2 + 6 * 2 * 4) * 2
    assert cost(spec).state_values == 2 * 2 + 2 * D * (D + 1)
    more = cost(spec, loops=4).flops_per_token - cost(spec).flops_per_token
    assert more == cost(SPEC, loops=4).flops_per_token - cost(SPEC).flops_per_token + 2 * 2 * wide
    text = describe(spec)
    assert "[1]-[2]  wide" in text and "mixer.num_kv_heads = 4, ffn.intermediate_size = 40\n" in text
    assert "mixer.k_shift = True" in text and "mixer = osam, mixer.buckets = 9\n" in text and text.isascii()


def test_drawing_says_which_blocks_of_a_segment_differ() -> None:
    def drawn(layout: str, *changes: tuple[str, dict[str, Any]], **given: Any) -> list[str]:
        overrides = tuple(BlockOverride(where=where, set=options) for where, options in changes)
        lines = describe(change(layout=layout, overrides=overrides, **given)).splitlines()
        return [line.strip() for line in lines if " = " in line]

    assert drawn("5", ("1", {"dropout": 0.1}), ("2-3", {"dropout": 0.2}), ("4", {"dropout": 0.0})) == [
        "[1]: dropout = 0.1",
        "[2] to [3]: dropout = 0.2",
    ], "what is as everywhere is not said"
    assert drawn("a:2 1 a", ("0-1", {"dropout": 0.1})) == ["dropout = 0.1"], "of the blocks, not of each visit"
    scaled = RMSNormSpec(depth_scale=True)
    found = drawn("3", ("0", {"norm.depth": 1}), ("1", {"norm.depth": 5}), norm=scaled)
    assert found == ["[1]: norm.depth = 5"], "a depth that the block has anyway is not said"
    choke = {"kind": "choke", "intermediate_size": F, "choke_size": 4, "loops": 2}
    assert drawn("1 (1)x2", ("1", {"ffn": choke, "mixer.rope.loop_scales": [9.0, 1.0]})) == [
        "ffn = choke, mixer.rope.loop_scales = 9.0 1.0, ffn.choke_size = 4"
    ]


def osam(**options: Any) -> ModelSpec:
    return change(mixer=OsamSpec(buckets=30, readout_hidden=6, **options))


def test_parameters_of_osam() -> None:
    m, r = 30, 6
    numbers = 3  # two phases and a gate
    readout = r * m + r + D * r + D
    values = D * D + 2 * D + 2 * (D * D + D) + 1
    rest = V * D + 4 * (3 * D * F + 2 * D) + D
    base = rest + 4 * (2 * D * D + readout + numbers + 1 + values)
    for options, expected in (
        ({}, base),
        ({"value_path": False}, base - 4 * values),
        ({"frequencies": 4}, base + 4 * 3),
        ({"frequencies": 4, "decay": True}, base + 4 * (3 + 4)),
        ({"independent_hashes": True, "normalisation": "rms", "kupdate": 3, "dropout": 0.1, "hash_seed": 1}, base),
    ):
        assert cost(osam(**options)).parameters == expected, options
    final = cost(osam().replace(norm=LayerNormSpec(placement="final")))
    assert final.parameters == base - 4 * 2 * D + D  # a bias of the last norm, and no other norms
    bare = cost(osam().replace(ffn=NoFeedForwardSpec()))
    assert bare.parameters == base - 4 * (3 * D * F + D)


def test_the_state_of_osam_is_all_it_remembers() -> None:
    visits = 8
    for options, each in (({}, 2 * D * (D + 1)), ({"value_path": False}, 2 * D), ({"buckets": 4096}, 2 * D * (D + 1))):
        spec = change(mixer=OsamSpec(**{"readout_hidden": 6, **options}))
        found = cost(spec, context=10)
        assert (found.state_values, found.cache_values_per_token) == (visits * each, 0), options
        assert cost(spec, context=10**6).state_values == found.state_values
    shared = osam().replace(share_last_kv=True)
    assert cost(shared).state_values == 4 * 2 * D * (D + 1)


def test_operations_of_osam_do_not_grow_with_the_text() -> None:
    long = cost(osam(), context=10_000).flops_per_token
    assert cost(osam(), context=1_000_000).flops_per_token == long
    assert cost(osam(kupdate=4), context=10_000).flops_per_token < long
    assert cost(osam(value_path=False), context=10_000).flops_per_token < long
    attention = cost(SPEC, context=1_000_000).flops_per_token
    assert attention > 100 * long
