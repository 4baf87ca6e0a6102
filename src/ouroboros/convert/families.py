"""Families of pretrained models: what their configurations mean in our parts, and what their tensors are called here.

A configuration is one of transformers, whose fields are as documented there. What it asks for and our parts cannot do
is refused by name; that the rest is understood is proved by comparing logits (:mod:`ouroboros.convert.donors`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    BlockSpec,
    FeedForwardSpec,
    ModelSpec,
    RMSNormSpec,
    RopeSpec,
    to_dict,
)
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.loop import LoopNormSpec
from ouroboros.config.parts.stem import EmbeddingScaleSpec
from ouroboros.convert.tensors import EMBEDDING, OUTPUT, RenameTable
from ouroboros.errors import check

FULL, SLIDING = "full_attention", "sliding_attention"
"""What an entry of ``layer_types`` may be."""
GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
"""``hidden_act`` and our feed-forward network."""

_BLOCK, _OURS = "model.layers.{}.", "model.decoder.layers.{}."
_IN_BLOCK = {
    **{f"self_attn.{name}_proj.{kind}": "" for name in "qkvo" for kind in ("weight", "bias")},
    **{f"self_attn.{name}_norm.weight": "" for name in "qk"},
    **{f"mlp.{name}_proj.{kind}": "" for name in ("gate", "up", "down") for kind in ("weight", "bias")},
    "input_layernorm.weight": "",
}
"""Names within a block; those that are empty here are the same here and there."""
_PRE = {"post_attention_layernorm.weight": ""}
_SANDWICH = {
    "post_attention_layernorm.weight": "mixer_output_layernorm.weight",
    "pre_feedforward_layernorm.weight": "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight": "mlp_output_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one ``model_type``."""

    title: str
    """For people."""
    table: RenameTable
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    qkv_bias: bool | None = None
    """Whether queries, keys and values have biases, and the output has none; None: all four by ``attention_bias``."""
    gemma: bool = False
    """Whether embeddings are scaled, sublayers have norms on both sides, and a norm's gain is stored less one."""

    def is_gain(self, name: str) -> bool:
        """Whether the tensor that is called so there is stored less one."""
        return self.gemma and name.endswith("norm.weight")


def _table(title: str, norms: Mapping[str, str] = _PRE) -> RenameTable:
    blocks = {f"{_BLOCK}{theirs}": f"{_OURS}{ours or theirs}" for theirs, ours in {**_IN_BLOCK, **norms}.items()}
    same = (EMBEDDING, "model.norm.weight", OUTPUT)
    return RenameTable(system=title, names={**blocks, **{name: name for name in same}}, optional=(OUTPUT,))


FAMILIES = {
    "llama": Family(title="Llama", table=_table("Llama")),
    "mistral": Family(title="Mistral", table=_table("Mistral"), qkv_bias=False),
    "qwen2": Family(title="Qwen2", table=_table("Qwen2"), qkv_bias=True),
    "qwen3": Family(title="Qwen3", table=_table("Qwen3"), qk_norm=True),
    "gemma3_text": Family(title="Gemma 3", table=_table("Gemma 3", _SANDWICH), qk_norm=True, gemma=True),
    "nanbeige": Family(title="Nanbeige", table=_table("Nanbeige")),
}
"""By ``model_type``."""


def family_of(model_type: Any) -> Family:
    """The family of a ``model_type``.

    Raises:
        OuroborosError: names it and those that are read.
    """
    check(model_type in FAMILIES, f"model_type {model_type!r} is of no family that is read ({', '.join(FAMILIES)})")
    return FAMILIES[model_type]


def check_settings(values: Mapping[str, Any]) -> None:
    """Refuse what a ``config.json`` asks for and our parts lack, before anything else reads it.

    Raises:
        OuroborosError: names the field and its value.
    """
    family_of(values.get("model_type"))
    for kind in values.get("layer_types") or ():
        check(kind in (FULL, SLIDING), f"layer_types: {kind!r} is no layer that is read ({FULL}, {SLIDING})")
    act = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    check(act in GATES, f"hidden_act: {act!r} is none of the activations that are read ({', '.join(GATES)})")
    for name in ("attn_logit_softcapping", "use_bidirectional_attention", "quantization_config"):
        check(not values.get(name), f"{name}: {values.get(name)!r} is not supported; only models without it are read")


def spec_of(config: Any) -> ModelSpec:
    """The model that a configuration of transformers, of one of :data:`FAMILIES`, describes: its layers in order.

    Raises:
        OuroborosError: names a field that asks for what our parts lack.
    """
    family, heads = family_of(config.model_type), config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    biases = getattr(config, "attention_bias", False)
    channels = getattr(config, "query_pre_attn_scalar", width)
    kinds = layer_kinds(config)
    loops = getattr(config, "num_loops", 1)
    between = loops > 1 and not config.skip_loop_final_norm
    rotations = {kind: _rope(config, kind) for kind in dict.fromkeys(kinds)}
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    mixer = AttentionSpec(
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=width,
        dropout=config.attention_dropout or 0.0,
        rope=rotations[kinds[0]],
        window=_window(config, kinds[0]),
        score_channels=None if channels == width else float(channels),
        qkv_bias=biases if family.qkv_bias is None else family.qkv_bias,
        out_bias=biases if family.qkv_bias is None else False,
        qk_norm="before_rope" if family.qk_norm else "none",
    )
    return ModelSpec(
        layout=str(len(kinds)) if loops == 1 else f"({len(kinds)})x{loops}",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        block=BlockSpec(
            mixer=mixer,
            ffn=FeedForwardSpec(
                kind=GATES[act],  # pyrefly: ignore[bad-argument-type]
                intermediate_size=config.intermediate_size,
                bias=getattr(config, "mlp_bias", False),
            ),
            norm=RMSNormSpec(placement="sandwich" if family.gemma else "pre", eps=config.rms_norm_eps),
        ),
        overrides=tuple(
            BlockOverride(where=where, set={"mixer.window": _window(config, kind), "mixer.rope": to_dict(rope)})
            for where, kind in _ranges(kinds)
            if (rope := rotations[kind]) and kind != kinds[0]
        ),
        loop=(LoopNormSpec(),) if between else (),
        stem=(EmbeddingScaleSpec(),) if family.gemma else (),
        head=LinearHeadSpec(logit_softcap=getattr(config, "final_logit_softcapping", None)),
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def layer_kinds(config: Any) -> list[str]:
    """The entry of ``layer_types`` of every layer, also where a family has no such field."""
    kinds = getattr(config, "layer_types", None)
    everywhere = SLIDING if getattr(config, "sliding_window", None) and config.model_type == "mistral" else FULL
    return list(kinds) if kinds else [everywhere] * config.num_hidden_layers


def _window(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == SLIDING else None


def _ranges(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Runs of equal layers as ``first-last``, each with its kind."""
    found, first = [], 0
    for kind, run in itertools.groupby(kinds):
        last = first + len(list(run)) - 1
        found.append((f"{first}-{last}" if last > first else str(first), kind))
        first = last + 1
    return found


def _rope(config: Any, kind: str) -> RopeSpec:
    """The rotation of layers of this kind."""
    values = config.rope_parameters
    values = dict(values.get(kind, values))
    name, base = values.get("rope_type", "default"), float(values["rope_theta"])
    check(values.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor: only 1.0 is supported")
    if name == "default":
        return RopeSpec(base=base)
    factor = float(values.get("factor", 1.0))
    if name == "linear":
        return RopeSpec(base=base, scale=factor)
    check(name == "llama3", f"rope_scaling: {name!r} is no kind that is read (default, linear, llama3)")
    return RopeSpec(
        base=base,
        slowing=factor,
        slowing_context=values["original_max_position_embeddings"],
        slowing_low=float(values["low_freq_factor"]),
        slowing_high=float(values["high_freq_factor"]),
    )


def rope_parameters(rope: RopeSpec) -> dict[str, Any]:
    """The way back: ``rope_parameters`` of transformers that :func:`spec_of` reads as ``rope``, where it has such."""
    if rope.slowing != 1.0:
        return {
            "rope_type": "llama3",
            "rope_theta": rope.base,
            "factor": rope.slowing,
            "original_max_position_embeddings": rope.slowing_context,
            "low_freq_factor": rope.slowing_low,
            "high_freq_factor": rope.slowing_high,
        }
    if rope.scale != 1.0:
        return {"rope_type": "linear", "rope_theta": rope.base, "factor": rope.scale}
    return {"rope_type": "default", "rope_theta": rope.base}
