"""The model's specification: ranges, changes, blocks that differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    BlockSpec,
    FeedForwardSpec,
    ModelSpec,
    NoFeedForwardSpec,
    RMSNormSpec,
    from_json,
    to_json,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.loop import LoopEmbeddingSpec, LoopNormSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec
from ouroboros.errors import OuroborosError

BAD_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (ModelSpec, {"vocab_size": 1}, "vocab_size must be >= 2, got 1"),
    (ModelSpec, {"hidden_size": 0}, "hidden_size"),
    (ModelSpec, {"hidden_size": 30}, "multiple of mixer.num_heads"),
    (ModelSpec, {"max_position_embeddings": 0}, "max_position_embeddings"),
    (ModelSpec, {"registers": -1}, "registers"),
    (ModelSpec, {"register_std": -1}, "register_std"),
    (ModelSpec, {"init_std": 0}, "init_std"),
    (ModelSpec, {"embedding_std": 0}, "embedding_std"),
    (ModelSpec, {"head_std": 0, "tie_embeddings": False}, "head_std must be > 0"),
    (ModelSpec, {"head_std": 1.0}, "head_std needs tie_embeddings false"),
    (ModelSpec, {"layout": ""}, "layout ''"),
    (ModelSpec, {"zero_init_outputs": True, "output_init": "depth_scaled"}, "exclude each other"),
    (ModelSpec, {"loop": (LoopNormSpec(), LoopNormSpec(rows=2))}, "loop has a part twice: norm, norm"),
    (ModelSpec, {"stem": (EmbeddingNormSpec(), EmbeddingNormSpec())}, "stem has a part twice"),
    (BlockSpec, {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_ranges(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        cls(**values)
    assert "\n" not in str(caught.value)


def test_changes_of_the_block_may_be_given_directly() -> None:
    mixer, ffn = AttentionSpec(num_heads=2), FeedForwardSpec(intermediate_size=9)
    expected = ModelSpec(layout="2", block=BlockSpec(mixer=mixer, ffn=ffn, dropout=0.1))
    assert ModelSpec().replace(layout="2", mixer=mixer, ffn=ffn, dropout=0.1) == expected
    assert ModelSpec().replace(block=BlockSpec(mixer=mixer), ffn=ffn, layout="2", dropout=0.1) == expected
    assert expected.replace() == expected
    with pytest.raises(TypeError):
        expected.replace(width=3)


def test_parts_and_sublayers() -> None:
    spec = ModelSpec(layout="(1)x2 1", loop=(LoopEmbeddingSpec(),), stem=(EmbeddingNormSpec(),))
    block = spec.block
    assert spec.blocks == (block, block) and spec.schedule.num_visits == 3
    outer = [spec.topology, *spec.stem, *spec.loop, spec.head]
    assert list(spec.parts) == [block.mixer, block.ffn, block.norm, block.residual, *outer]
    assert block.sublayers == 2 and dataclasses.replace(block, ffn=NoFeedForwardSpec()).sublayers == 1


def test_warnings_are_given_once_each() -> None:
    assert ModelSpec().warnings() == []
    override = BlockOverride(where="0", set={"ffn.intermediate_size": 7})
    spec = ModelSpec(hidden_size=4, overrides=(override,)).replace(mixer=OsamSpec(), residual=DeltaSpec(beta_init=0))
    assert [text.split()[0] for text in spec.warnings()] == ["mixer.buckets", "residual.beta_init"]


class TestOverrides:
    def overridden(self, *changes: tuple[str, dict[str, Any]], layout: str = "1 wide:(2)x3 1") -> ModelSpec:
        return ModelSpec(layout=layout, overrides=tuple(BlockOverride(where=where, set=s) for where, s in changes))

    def test_by_segment_number_and_range_the_later_wins(self) -> None:
        spec = self.overridden(
            ("wide", {"ffn.intermediate_size": 7, "norm.placement": "sandwich"}),
            ("2-3", {"ffn.intermediate_size": 9}),
            ("0", {"mixer.num_kv_heads": 2, "mixer.rope.base": 500.0}),
        )
        assert [block.ffn.hidden_width for block in spec.blocks] == [512, 7, 9, 9]
        assert [block.norm.placement for block in spec.blocks] == ["pre", "sandwich", "sandwich", "pre"]
        assert spec.blocks[0].mixer.rope.base == 500.0 and spec.blocks[1].norm == RMSNormSpec(placement="sandwich")
        read = from_json(ModelSpec, to_json(spec))
        assert read == spec and hash(read) == hash(spec)

    def test_a_part_of_another_kind(self) -> None:
        short = self.overridden(("wide", {"mixer": "osam", "ffn": "none", "dropout": 0.1}))
        whole = self.overridden(("wide", {"mixer": {"kind": "osam", "buckets": 5}}))
        assert short.blocks[1] == BlockSpec(mixer=OsamSpec(), ffn=NoFeedForwardSpec(), dropout=0.1)
        assert whole.blocks[2].mixer == OsamSpec(buckets=5) and whole.blocks[3] == BlockSpec()

    @pytest.mark.parametrize(
        ("where", "change", "message"),
        [
            ("narrow", {"dropout": 0.1}, r"has no segment 'narrow' \(wide\)"),
            ("4", {"dropout": 0.1}, "has blocks 0 to 3, not 4"),
            ("0", {"width": 3}, "overrides: unknown key 'width'; known: dropout"),
            ("0", {"ffn.size": 3}, r"overrides: a block has no option 'ffn\.size'"),
            ("0", {"dropout.x": 3}, r"a block has no option 'dropout\.x'"),
            ("0", {"ffn.intermediate_size": 0}, "overrides: .*ffn.intermediate_size must be >= 1"),
            ("0", {"ffn.intermediate_size": "wide"}, r"overrides: ffn\.intermediate_size: .*valid integer"),
            ("0", {"mixer": "osma"}, "overrides.*unknown kind 'osma'; did you mean 'osam'"),
            ("0", {"mixer.num_heads": 3}, "multiple of mixer.num_heads"),
            ("0", {"residual": {"kind": "delta", "values": 2}}, "must join to the same form of stream"),
            ("0", {"mixer": "cross"}, "mixer 'cross' of block 0 looks at another stream, and topology 'chain' shows"),
        ],
        ids=str,
    )
    def test_refused(self, where: str, change: dict[str, Any], message: str) -> None:
        with pytest.raises(OuroborosError, match=message) as caught:
            self.overridden((where, change))
        assert "\n" not in str(caught.value)
