"""What configurations of pretrained models mean in our parts; that they mean it, the proof of each donor shows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ouroboros.accounting import cost
from ouroboros.config import RopeSpec
from ouroboros.convert.families import FAMILIES, check_settings, family_of, layer_kinds, spec_of
from ouroboros.errors import OuroborosError

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_published_sizes() -> None:
    """Qwen2.5-3B, as its authors count it without the embeddings; and Gemma 3's smallest."""
    qwen = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    found = cost(spec_of(qwen))
    assert found.parameters - found.embedding_parameters == 2_774_773_760
    small = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    )
    assert cost(spec_of(small)).parameters == 268_098_176


def test_layers_of_two_kinds() -> None:
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16, sliding_window_pattern=2)
    spec = spec_of(config)
    mixers = [block.mixer for block in spec.blocks]
    assert [mixer.looks_back for mixer in mixers] == [16, None, 16, None]
    assert [mixer.rotary(24)[0].base for mixer in mixers] == [1e4, 1e6, 1e4, 1e6]  # pyrefly: ignore
    assert spec.block.mixer.replace(score_channels=256.0) == spec.block.mixer


def test_windows_of_all_layers_and_of_none() -> None:
    assert layer_kinds(MistralConfig(**SIZES, sliding_window=8)) == ["sliding_attention"] * 4
    assert layer_kinds(MistralConfig(**SIZES, sliding_window=None)) == ["full_attention"] * 4
    assert layer_kinds(Qwen3Config(**SIZES, sliding_window=8)) == ["full_attention"] * 4  # it is switched off
    assert spec_of(LlamaConfig(**SIZES)).overrides == ()


def test_rotations() -> None:
    def rope(**values: Any) -> RopeSpec:
        return spec_of(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500.0, **values})).block.mixer.rope  # pyrefly: ignore

    assert rope(rope_type="default") == RopeSpec(base=500.0)
    assert rope(rope_type="linear", factor=4.0) == RopeSpec(base=500.0, scale=4.0)
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert rope(rope_type="llama3", factor=32.0, **more) == RopeSpec(base=500.0, slowing=32.0)
    with pytest.raises(OuroborosError, match="partial_rotary_factor"):
        rope(rope_type="default", partial_rotary_factor=0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_go_both_ways(name: str) -> None:
    names = family_of(name).table.names
    assert len(set(names.values())) == len(names)


def test_unknown_settings() -> None:
    with pytest.raises(OuroborosError, match=r"model_type None is of no family that is read \(llama, mistral, qwen2"):
        check_settings({})
    check_settings({"model_type": "llama", "layer_types": None})
