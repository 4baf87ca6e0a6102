"""What earlier versions wrote is read as the same model."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ouroboros.config import (
    AttentionSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ModelSpec,
    NoFeedForwardSpec,
    Recipe,
    RMSNormSpec,
    RopeSpec,
    from_dict,
    to_dict,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe

OLD = json.loads("""
{"layout": "6", "vocab_size": 257, "hidden_size": 256, "max_position_embeddings": 4096, "mixer": {"kind": "attention",
"num_heads": 4, "num_kv_heads": null, "head_dim": null, "qkv_bias": false, "out_bias": false, "qk_norm": "none",
"query_gain": null, "q_activation": "none", "k_activation": "none", "v_activation": "none", "k_shift": false,
"v_shift": false, "head_norm": false, "output_gate": false, "dropout": 0.0, "rope": {"base": 10000.0, "fraction": 1.0,
"scale": 1.0}}, "ffn": {"kind": "swiglu", "intermediate_size": 512, "bias": false, "negative_slope": 0.5, "dropout":
0.0}, "norm": {"kind": "rms", "placement": "pre", "eps": 1e-06}, "residual": "additive", "delta": {"values": 1,
"compressor": "channel", "kernel": 4, "compressor_init": "average", "embedding_conv": false, "embedding_kernel": 4,
"gate": "linear", "gate_hidden": 128, "beta_init": 1.0, "value": "sigmoid", "value_scale": 4.0, "value_constant": 2.0,
"guard": "additive", "eps": 1e-06, "erase": true}, "loop": {"norm": false, "embedding": false, "inject": "none", "gate":
false, "gate_bias": -2.0, "contractive": 1.0, "share_last_kv": false, "max_loops": null}, "registers": 0,
"register_std": null, "positions": "rope", "tie_embeddings": true, "embedding_norm": false, "logit_scale": 1.0,
"logit_softcap": null, "dropout": 0.0, "init_std": 0.02, "embedding_std": null, "head_std": null, "output_init":
"normal", "zero_init_outputs": false}
""")
"""The model's defaults as version 0.4 wrote them."""
ROPE = {"base": 500.0, "fraction": 0.5, "scale": 2.0}
LATENT = {"kind": "latent_attention", "num_heads": 4, "head_dim": None, "kv_rank": 7, "query_rank": 0, "rope_dim": 6}
LATENT |= {"dropout": 0.1, "rope": ROPE}
BOTTLENECK = {"kind": "bottleneck_attention", "num_heads": 4, "head_dim": None, "latent_rank": 9, "qk_norm": "none"}
BOTTLENECK |= {"cache": "latent", "dropout": 0.0, "rope": ROPE}
MEMORY = {"kind": "osam", "buckets": 30, "readout_hidden": 8, "kupdate": 2, "value_path": True, "freeze_phase": False}
MEMORY |= {"detach_state": False, "freq_cache": True, "independent_hashes": True, "sketch_values": False}
MEMORY |= {"frequencies": 8, "decay": True, "time_scales": [1.25, 64.0], "normalisation": "rms", "gate_cap": 2.0}
MEMORY |= {"gate_start": 0.0, "hash_seed": 7, "dropout": 0.1}
ALL_LOOP_PARTS = {"norm": True, "embedding": True, "inject": "concat", "gate": True, "gate_bias": -1.0}
ALL_LOOP_PARTS |= {"contractive": 0.25, "share_last_kv": True, "max_loops": 5}
LOOP_SPECS = (
    InjectionSpec(mode="concat"),
    LoopEmbeddingSpec(rows=5),
    LoopNormSpec(rows=5),
    RecurrenceGateSpec(bias=-1.0),
    ContractiveStepSpec(step=0.25),
)
ROTATED = RopeSpec(base=500.0, fraction=0.5, scale=2.0)

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "attention": (
        {"mixer": {"num_kv_heads": 2, "qk_norm": "after_rope", "query_gain": 1.5, "k_shift": True, "rope": ROPE}},
        {"mixer": AttentionSpec(num_kv_heads=2, qk_norm="after_rope", query_gain=1.5, k_shift=True, rope=ROTATED)},
    ),
    "latent attention": (
        {"mixer": LATENT},
        {"mixer": LatentAttentionSpec(kv_rank=7, query_rank=0, rope_dim=6, dropout=0.1, rope=ROTATED)},
    ),
    "bottleneck": (
        {"mixer": BOTTLENECK},
        {"mixer": BottleneckAttentionSpec(latent_rank=9, qk_norm="none", cache="latent", rope=ROTATED)},
    ),
    "memory of constant size": (
        {"mixer": MEMORY},
        {
            "mixer": OsamSpec(
                **{k: tuple(v) if k == "time_scales" else v for k, v in MEMORY.items() if k != "freq_cache"}
            )
        },
    ),
    "feed-forward": (
        {"ffn": {"kind": "leaky_relu2", "intermediate_size": 9, "bias": True, "negative_slope": 0.3, "dropout": 0.1}},
        {"ffn": FeedForwardSpec(kind="leaky_relu2", intermediate_size=9, bias=True, negative_slope=0.3, dropout=0.1)},
    ),
    "no feed-forward": ({"ffn": {"kind": "none"}}, {"ffn": NoFeedForwardSpec()}),
    "rms norm": (
        {"norm": {"placement": "sandwich", "eps": 1e-5}},
        {"norm": RMSNormSpec(placement="sandwich", eps=1e-5)},
    ),
    "layer norm": (
        {"norm": {"kind": "layer", "placement": "final", "eps": 1e-4}},
        {"norm": LayerNormSpec(placement="final", eps=1e-4)},
    ),
    "delta": ({"residual": "delta"}, {"residual": DeltaSpec()}),
    "expanded delta": (
        {"residual": "delta", "delta": {"values": 4, "compressor": "token", "embedding_conv": True, "erase": False}},
        {"residual": DeltaSpec(values=4, compressor="token", embedding_conv=True, erase=False)},
    ),
    "delta options of another residual": ({"delta": {"values": 4, "beta_init": 0.0}}, {}),
    "loop parts": (
        {"layout": "1 (1)x2", "loop": ALL_LOOP_PARTS},
        {"layout": "1 (1)x2", "loop": LOOP_SPECS, "share_last_kv": True},
    ),
    "loop parts without a loop were never built": (
        {"layout": "3", "loop": ALL_LOOP_PARTS | {"share_last_kv": False}},
        {"layout": "3"},
    ),
    "options of a gate that is off": ({"layout": "(1)x2", "loop": {"gate_bias": 3.0}}, {"layout": "(1)x2"}),
    "surroundings": (
        {"positions": "learned", "embedding_norm": True, "logit_scale": 0.5, "logit_softcap": 5.0, "dropout": 0.1},
        {
            "stem": (EmbeddingNormSpec(), LearnedPositionsSpec()),
            "head": LinearHeadSpec(logit_scale=0.5, logit_softcap=5.0),
            "dropout": 0.1,
        },
    ),
    "the rest": (
        {"registers": 3, "register_std": 1.0, "tie_embeddings": False, "head_std": 0.1, "output_init": "depth_scaled"},
        {"registers": 3, "register_std": 1.0, "tie_embeddings": False, "head_std": 0.1, "output_init": "depth_scaled"},
    ),
}
TINY: dict[str, dict[str, Any]] = {
    "gpt": {"layout": "3", "hidden_size": 64, "mixer": {"num_heads": 2}, "ffn": {"intermediate_size": 192}},
    "loop": {
        "layout": "1 (1)x2 1",
        "hidden_size": 64,
        "mixer": {"num_heads": 2, "qk_norm": "before_rope"},
        "ffn": {"intermediate_size": 192},
        "norm": {"placement": "sandwich"},
        "embedding_norm": True,
    },
    "delta-published": {
        "layout": "3",
        "hidden_size": 64,
        "max_position_embeddings": 1024,
        "mixer": {"num_heads": 2, "head_dim": 32, "qk_norm": "after_rope"},
        "ffn": {"intermediate_size": 170},
        "norm": {"eps": 1e-05},
        "residual": "delta",
        "delta": {"compressor_init": "normal"},
        "init_std": 0.0625,
        "embedding_std": 0.02,
        "output_init": "depth_scaled",
    },
    "osam-published": {
        "layout": "1",
        "vocab_size": 128,
        "hidden_size": 16,
        "max_position_embeddings": 1048576,
        "mixer": {"kind": "osam", "buckets": 64, "readout_hidden": 32, "freq_cache": False},
        "ffn": {"kind": "none"},
        "norm": {"kind": "layer", "placement": "final", "eps": 1e-05},
        "tie_embeddings": False,
        "embedding_std": 1.0,
        "head_std": 0.14433756729740643,
    },
    "rhrm": {
        "layout": "(1)x3",
        "vocab_size": 4096,
        "hidden_size": 64,
        "max_position_embeddings": 2048,
        "mixer": {"kind": "latent_attention", "num_heads": 2, "kv_rank": None, "query_rank": None, "rope_dim": None},
        "ffn": {"intermediate_size": 256},
        "norm": {"placement": "sandwich"},
        "registers": 5,
    },
    "rhrm-published": {
        "layout": "(1)x3",
        "vocab_size": 50257,
        "hidden_size": 64,
        "mixer": {"kind": "bottleneck_attention", "num_heads": 2, "latent_rank": None, "dropout": 0.1},
        "ffn": {"intermediate_size": 256, "bias": True, "dropout": 0.1},
        "norm": {"eps": 1e-08},
        "registers": 5,
        "register_std": 1.0,
        "logit_scale": 0.1,
        "dropout": 0.1,
    },
}
"""Models of recipes at size tiny, what differs from the defaults."""


def written(changes: dict[str, Any]) -> dict[str, Any]:
    """The defaults with changes; a part of another kind is written as a whole."""
    values = copy.deepcopy(OLD)
    for name, value in changes.items():
        whole = not isinstance(value, dict) or (name == "mixer" and "kind" in value)
        values[name] = value if whole else values[name] | value
    return values


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_option(name: str) -> None:
    changes, today = OPTIONS[name]
    expected, values = ModelSpec().replace(**today), written(changes)
    before = copy.deepcopy(values)
    assert from_dict(ModelSpec, values) == expected
    assert values == before, "what is read is left as it was"
    assert from_dict(ModelSpec, to_dict(expected)) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_left_out_is_as_it_was_by_default(name: str) -> None:
    changes, today = OPTIONS[name]
    assert from_dict(ModelSpec, changes) == ModelSpec().replace(**today)


@pytest.mark.parametrize("name", TINY)
def test_shipped_recipes(name: str) -> None:
    found = from_dict(Recipe, {"name": "x", "model": written(TINY[name])})
    assert found.model == recipe(name, "tiny").model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, r"unknown key 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"mixer": {"heads": 3}}, r"mixer: unknown key 'heads'; did you mean 'num_heads'\?"),
        ({"mixer": 4}, "mixer: "),
        ({"loop": {"embeddings": True}}, r"unknown key 'embeddings'"),
        ({"residual": "delta", "delta": {"betas": 1}}, r"residual: unknown key 'betas'; did you mean"),
        ({"residual": "detla"}, r"residual\.kind: unknown kind 'detla'; did you mean 'delta'\?"),
        ({"loop": {"contractive": 0}, "layout": "(1)x2"}, r"loop\.contractive must be in \(0, 1\], got 0"),
        ({"layout": "(2)x0"}, r"layout '\(2\)x0', column 5"),
        ({"mixer": {"rope": {"theta": 3}}}, r"mixer\.rope: unknown key 'theta'"),
    ],
    ids=str,
)
def test_is_read_as_strictly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        from_dict(ModelSpec, OLD | changes)
    assert "\n" not in str(caught.value)


def test_what_is_written_today_is_left_as_it_is() -> None:
    for values in ({}, {"layout": "3"}, {"loop": []}, to_dict(ModelSpec())):
        assert ModelSpec.migrate(values) == values
