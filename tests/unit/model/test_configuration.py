"""The transformers envelope of a specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec, to_dict
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import CONSTANT_STATE, FILTERED, OuroborosConfig

SPEC = ModelSpec(
    layout="1 (2)x3 1",
    hidden_size=32,
    vocab_size=99,
    max_position_embeddings=77,
    tie_embeddings=False,
).replace(mixer=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6), ffn=FeedForwardSpec(intermediate_size=40))
PLAIN = "full_attention"


def test_standard_fields_are_derived() -> None:
    config = OuroborosConfig.from_spec(SPEC, eos_token_id=98)
    assert config.model_spec == SPEC
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (99, 32, 77)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 6)
    assert (config.intermediate_size, config.tie_word_embeddings) == (40, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (98, 98, 98)


def test_layers_count_cache_entries() -> None:
    config = OuroborosConfig.from_spec(SPEC)
    assert config.num_hidden_layers == len(config.layer_types) == 8
    shared = OuroborosConfig(spec={**to_dict(SPEC), "share_last_kv": True})
    assert shared.num_hidden_layers == 4
    assert shared.at_loops(9).num_hidden_layers == 4


def test_entries_remember_for_filters_only_where_there_are_some() -> None:
    """The first entry also serves what is outside of blocks."""
    token = DeltaSpec(values=2, compressor="token")
    for changes, first, rest in (
        ({}, PLAIN, PLAIN),
        ({"residual": DeltaSpec(values=2)}, PLAIN, PLAIN),
        ({"residual": token}, FILTERED, FILTERED),
        ({"residual": DeltaSpec(values=2, compressor="token", kernel=1)}, PLAIN, PLAIN),
        ({"residual": DeltaSpec(values=2, embedding_conv=True)}, FILTERED, PLAIN),
        ({"mixer": AttentionSpec(k_shift=True)}, FILTERED, FILTERED),
        ({"mixer": OsamSpec(), "residual": token}, CONSTANT_STATE, CONSTANT_STATE),
    ):
        config = OuroborosConfig.from_spec(SPEC.replace(**changes))
        assert config.layer_types == [first] + [rest] * 7, changes
        assert config.at_loops(1).layer_types == [first] + [rest] * 3


def test_entries_are_those_of_their_blocks() -> None:
    override = BlockOverride(where="1", set={"mixer.k_shift": True})
    config = OuroborosConfig.from_spec(SPEC.replace(overrides=(override,)))
    assert config.layer_types == [PLAIN, *[FILTERED, PLAIN] * 3, PLAIN]
    shared = OuroborosConfig.from_spec(SPEC.replace(overrides=(override,), share_last_kv=True))
    assert shared.layer_types == [PLAIN, FILTERED, PLAIN, PLAIN]


def test_spec_wins_over_fields_beside_it() -> None:
    config = OuroborosConfig(spec=to_dict(SPEC), hidden_size=7, num_hidden_layers=3, layer_types=["full_attention"])
    assert (config.hidden_size, config.num_hidden_layers, len(config.layer_types)) == (32, 8, 8)


def test_other_loop_count() -> None:
    config = OuroborosConfig.from_spec(SPEC, eos_token_id=98)
    config._attn_implementation = "eager"
    other = config.at_loops(5)
    assert (other.loops, other.num_hidden_layers, other.schedule.notation) == (5, 12, "1 (2)x5 1")
    assert (config.loops, config.num_hidden_layers, config.schedule.notation) == (None, 8, "1 (2)x3 1")
    # A lost attention implementation means no mask at all, so padding would be attended to.
    assert other._attn_implementation == "eager" and other.eos_token_id == 98
    with pytest.raises(OuroborosError, match="loops must be >= 1"):
        config.at_loops(0)
    with pytest.raises(OuroborosError, match="has no loop"):
        OuroborosConfig.from_spec(ModelSpec(layout="2")).at_loops(2)


@pytest.mark.parametrize("loops", [None, 5])
def test_round_trip_through_a_file(tmp_path: Path, loops: int | None) -> None:
    config = OuroborosConfig.from_spec(SPEC, eos_token_id=98)
    config = config if loops is None else config.at_loops(loops)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, OuroborosConfig)
    assert loaded.model_spec == SPEC and loaded.schedule == config.schedule
    assert loaded.num_hidden_layers == config.num_hidden_layers and loaded.loops == loops
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ouroboros"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 32}, r"config\.json: spec: unknown key 'hiden_size'; did you mean 'hidden_size'"),
        (
            {"loop": [{"kind": "embeddings"}]},
            r"spec\.loop\.0\.kind: unknown kind 'embeddings'; did you mean 'embed",
        ),
        (
            {"block": {"mixer": {"rope": {"bas": 2.0}}}},
            r"spec\.block\.mixer\.rope: unknown key 'bas'; did you mean",
        ),
        ({"hidden_size": "wide"}, r"config\.json: spec: hidden_size: .*integer"),
        ({"layout": "(2)x0"}, r"layout '\(2\)x0', column 5"),
    ],
    ids=str,
)
def test_bad_specifications_are_one_line_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        OuroborosConfig(spec=to_dict(SPEC) | change)
    assert "\n" not in str(caught.value)
    OuroborosConfig.from_spec(SPEC).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["spec"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(OuroborosError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_layer_types_of_another_number_are_refused() -> None:
    config = OuroborosConfig.from_spec(SPEC)
    config.layer_types = ["full_attention"]
    with pytest.raises(OuroborosError, match="layer_types has 1 entries, num_hidden_layers is 8"):
        config.validate_layer_type()
