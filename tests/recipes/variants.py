"""Small models that between them have every part and every option."""

from __future__ import annotations

from typing import Any

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    FeedForwardSpec,
    LayerNormSpec,
    ModelSpec,
    NoFeedForwardSpec,
    RMSNormSpec,
    RopeSpec,
)
from ouroboros.config.parts import modulated as parts
from ouroboros.config.parts.choke import ChokeSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.delta_rule import DeltaRuleSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.config.parts.loop import (
    AnchorSpec,
    BridgeSpec,
    ContractiveStepSpec,
    FlowSpec,
    HyperSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopGainSpec,
    LoopNormSpec,
    LoopSmearSpec,
    RecurrenceGateSpec,
    UpdateGateSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.residual import ScaledResidualSpec
from ouroboros.config.parts.stem import (
    EmbeddingNormSpec,
    EmbeddingScaleSpec,
    LearnedPositionsSpec,
    NgramSpec,
    SmearSpec,
)
from ouroboros.config.parts.tap import TapSpec
from ouroboros.config.parts.topology import UNetSpec
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.systems.controller.parts import MatrixControllerSpec

BASE = ModelSpec(layout="1 (1)x2", vocab_size=67, hidden_size=32, max_position_embeddings=64).replace(
    mixer=AttentionSpec(num_heads=4), ffn=FeedForwardSpec(intermediate_size=48)
)
ALL_LOOP_PARTS = (
    FlowSpec(rank=6),
    InjectionSpec(mode="concat"),
    LoopEmbeddingSpec(),
    LoopSmearSpec(),
    AnchorSpec(width=5),
    HyperSpec(streams=2),
    LoopNormSpec(),
    RecurrenceGateSpec(),
    LoopGainSpec(form="channel"),
    ContractiveStepSpec(),
    HaltSpec(hidden=5),
    BridgeSpec(),
)
LEARNED = (LearnedPositionsSpec(),)
SANDWICH = RMSNormSpec(placement="sandwich")


def mixer(**changes: Any) -> dict[str, Any]:
    """Other attention."""
    return {"mixer": AttentionSpec(**{"num_heads": 4, **changes})}


def latent(**changes: Any) -> dict[str, Any]:
    """Latent attention."""
    return {"mixer": LatentAttentionSpec(**{"num_heads": 4, **changes})}


def bottleneck(**changes: Any) -> dict[str, Any]:
    """Attention through a bottleneck."""
    return {"mixer": BottleneckAttentionSpec(**{"num_heads": 4, **changes})}


def osam(**changes: Any) -> dict[str, Any]:
    """A memory of constant size, in every gradient."""
    return {"mixer": OsamSpec(**{"buckets": 300, "readout_hidden": 24, "detach_state": False, **changes})}


def delta_rule(**changes: Any) -> dict[str, Any]:
    """A memory of constant size that corrects itself."""
    return {"mixer": DeltaRuleSpec(**changes)}


def ffn(**changes: Any) -> dict[str, Any]:
    """Another feed-forward network."""
    return {"ffn": FeedForwardSpec(**{"intermediate_size": 48, **changes})}


def loop(*parts: Any) -> dict[str, Any]:
    """Loop parts."""
    return {"loop": parts}


def delta(**changes: Any) -> dict[str, Any]:
    """The delta residual."""
    return {"residual": DeltaSpec(**changes)}


def model(*parts: dict[str, Any], **changes: Any) -> ModelSpec:
    """The base with all of the changes."""
    return BASE.replace(**{name: value for part in (*parts, changes) for name, value in part.items()})


def other(where: str, **options: Any) -> BlockOverride:
    """Blocks that differ from the others, options with ``__`` for the dot."""
    return BlockOverride(where=where, set={name.replace("__", "."): value for name, value in options.items()})


def modulated(
    *given: Any, layout: str = "1 loop:(1)x2", alpha: float = 2.0, registers: int = 0, gate: str = "swiglu", **own: Any
) -> ModelSpec:
    """A loop with these parts, of which the first hands cores to its blocks; ``own`` are more options of those."""
    own |= {"rank": given[0].rank, "core": given[0].makes}
    own |= {"alpha": alpha, "bases": "trained" if alpha == 2 else "frozen"}
    mixer = {"kind": "modulated_attention", "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, **own}
    ffn = {"kind": f"modulated_{gate}", "intermediate_size": 40, "bias": True, **own}
    return model(loop(*given), layout=layout, overrides=(other("loop", mixer=mixer, ffn=ffn),), registers=registers)


def generated(layout: str, *more: Any, registers: int = 0, bases: int = 2, **options: Any) -> ModelSpec:
    """A loop that generates additions to the maps of its blocks; other sizes with one basis tensor than with two."""
    n = bases - 1
    sizes = {"state": 4 + n, "steps": 3 + n, "hidden": 6 + n, "style": 5 + n}
    own = {"rank": 2 + n, "alpha": 3.0 + n, "bases": bases, "divisor": 4 + n}
    mixer = {"kind": "generated_attention", "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, **own}
    ffn = {"kind": "generated_swiglu", "intermediate_size": 36 + 4 * n, "bias": bool(n), "dropout": 0.1 * n, **own}
    parts = loop(MatrixControllerSpec(bases=bases, **{**sizes, **options}), *more)
    return model(parts, layout=layout, overrides=(other("loop", mixer=mixer, ffn=ffn),), registers=registers)


def bridges() -> tuple[BlockOverride, BlockOverride]:
    """Blocks that make hints of one stream for the other by attention."""
    rest = {"ffn": "none", "residual": "none", "norm__placement": "final"}
    mixers = {name: {"kind": "cross", "width": width} for name, width in (("up", 8), ("down", 6))}
    return other("up", mixer=mixers["up"], **rest), other("down", mixer=mixers["down"], **rest)


# Options that do not touch each other share a variant, because each variant takes half a second.
VARIANTS = {
    "registers": model(registers=3),
    "gqa, swiglu bias": model(mixer(num_kv_heads=2), ffn(kind="swiglu", bias=True)),
    "one kv head, relu2": model(mixer(num_kv_heads=1, head_dim=12), ffn(kind="relu2", bias=True)),
    "biases, sandwich": model(mixer(qkv_bias=True, out_bias=True), norm=RMSNormSpec(placement="sandwich", eps=1e-5)),
    "qk norm before, leaky relu2": model(
        mixer(qk_norm="before_rope", query_gain=1.5), ffn(kind="leaky_relu2", bias=True, negative_slope=0.3)
    ),
    "qk norm after, gelu": model(mixer(qk_norm="after_rope"), ffn(kind="gelu", bias=True)),
    "rope off, logits": model(
        mixer(rope=RopeSpec(fraction=0.0)), head=LinearHeadSpec(logit_scale=0.5, logit_softcap=5.0)
    ),
    "rope half, untied": model(
        mixer(rope=RopeSpec(fraction=0.5, base=500.0)), tie_embeddings=False, stem=(EmbeddingNormSpec(),)
    ),
    "window of three, geglu, scaled": model(
        mixer(
            num_kv_heads=2,
            window=3,
            score_channels=5.0,
            rope=RopeSpec(slowing=8.0, slowing_context=20, slowing_low=0.5, slowing_high=3.0),
        ),
        ffn(kind="geglu", bias=True),
        stem=(EmbeddingScaleSpec(),),
    ),
    "window in some blocks, registers": model(
        {"overrides": (other("0", mixer__window=2), other("1", mixer__window=5, mixer__rope__base=50.0))},
        registers=3,
        stem=(EmbeddingScaleSpec(factor=3.0),),
    ),
    "bigrams": model(stem=(NgramSpec(buckets=40, width=6),)),
    "trigrams, smear, boundary, registers": model(
        stem=(NgramSpec(width=32, trigram=True, boundary=5), EmbeddingNormSpec(), SmearSpec(boundary=5)), registers=2
    ),
    "smear, share last kv": model({"share_last_kv": True}, stem=(NgramSpec(), SmearSpec(start=-1.0))),
    "rope scaled, zero outputs": model(mixer(rope=RopeSpec(scale=4.0)), zero_init_outputs=True, init_std=0.05),
    "loop norm": model(loop(LoopNormSpec())),
    "loop embedding": model(loop(LoopEmbeddingSpec(rows=3))),
    "loop inject add": model(loop(InjectionSpec())),
    "loop inject concat": model(loop(InjectionSpec(mode="concat"))),
    "loop gate": model(loop(RecurrenceGateSpec(bias=-1.0))),
    "loop flow, gain": model(loop(FlowSpec(), LoopGainSpec(form="scalar"))),
    "loop smear, anchor, two loops": model(
        loop(LoopSmearSpec(start=-1.0), AnchorSpec(), LoopGainSpec(form="rms")), layout="(1)x2 1 (2)x3", registers=2
    ),
    "loop hyper": model(loop(HyperSpec())),
    "loop contractive": model(loop(ContractiveStepSpec(step=0.25))),
    "loop all": model(loop=ALL_LOOP_PARTS),
    "loop all, registers, gqa": model(mixer(num_kv_heads=2), loop=ALL_LOOP_PARTS, registers=2),
    "share last kv": model(share_last_kv=True),
    "share last kv, registers": model(share_last_kv=True, layout="1 (2)x3 1", registers=2),
    "key and value shift, output gate": model(
        mixer(k_shift=True, v_shift=True, output_gate=True, q_activation="silu", k_activation="elu+1"),
        output_init="depth_scaled",
    ),
    "key shift, head norm, registers, gqa": model(
        mixer(num_kv_heads=2, k_shift=True, head_norm=True, q_activation="relu", v_activation="silu"), registers=3
    ),
    "value shift, head norm and gate": model(
        mixer(v_shift=True, head_norm=True, output_gate=True, v_activation="relu")
    ),
    "activations of queries and keys": model(
        mixer(q_activation="elu+1", k_activation="silu", v_activation="elu+1"), embedding_std=0.1
    ),
    "relu of keys, norm at the end": model(mixer(k_activation="relu"), layout="2", norm=RMSNormSpec(placement="final")),
    "dropout": model(ffn(dropout=0.1), dropout=0.1, layout="3"),
    "feed-forward dropout": model(ffn(dropout=0.1), layout="(1)x1"),
    "attention dropout": model(mixer(dropout=0.2), layout="(1)x1"),
    "latent": model(latent()),
    "latent, registers": model(latent(query_rank=0, rope_dim=6, head_dim=10), registers=3, register_std=1.0),
    "latent sizes, dropout": model(
        latent(kv_rank=7, query_rank=5, dropout=0.1, rope=RopeSpec(base=300.0, fraction=0.5, scale=2.0)), layout="3"
    ),
    "latent, share last kv": model(latent(), {"share_last_kv": True}),
    "bottleneck": model(bottleneck()),
    "bottleneck, latent cache": model(bottleneck(cache="latent", latent_rank=6), registers=3),
    "bottleneck, dropout": model(
        bottleneck(head_dim=10, dropout=0.1, rope=RopeSpec(base=300.0, fraction=0.5, scale=2.0)), layout="3"
    ),
    "learned positions": model(bottleneck(qk_norm="none"), stem=LEARNED, registers=2),
    "delta": model(delta(value_scale=2.0)),
    "delta linear, sandwich": model(delta(value="linear", guard="clamped", eps=1e-3, beta_init=0.5), norm=SANDWICH),
    "delta constant, dropout": model(
        delta(gate="two_layer", gate_hidden=12, value="constant", value_constant=1.5, erase=False), dropout=0.1
    ),
    "delta channel, loop all": model(delta(values=3, kernel=5), loop=ALL_LOOP_PARTS),
    "delta channel, embedding filter": model(
        delta(values=4, embedding_conv=True, embedding_kernel=6), registers=2, stem=(EmbeddingNormSpec(),)
    ),
    "delta token": model(delta(values=2, compressor="token")),
    "delta token, latent, dropout": model(
        delta(values=2, compressor="token", kernel=3, compressor_init="normal"), latent(), layout="3", dropout=0.1
    ),
    "delta token, loop all": model(
        delta(values=3, compressor="token", embedding_conv=True),
        mixer(k_shift=True, v_shift=True, num_kv_heads=2),
        loop=ALL_LOOP_PARTS,
        registers=2,
        norm=SANDWICH,
    ),
    "delta token, learned positions": model(
        delta(values=2, compressor="token", kernel=2, embedding_conv=True),
        bottleneck(cache="latent"),
        stem=LEARNED,
        registers=5,
    ),
    "delta token, share last kv": model(
        delta(values=2, compressor="token", embedding_conv=True), {"share_last_kv": True}, registers=2
    ),
    "shifts": model(mixer(k_shift=True, v_shift=True)),
    "activations, head norm": model(
        mixer(q_activation="silu", k_activation="relu", v_activation="elu+1", head_norm=True), embedding_std=0.5
    ),
    "other activations, gate": model(
        mixer(q_activation="relu", k_activation="elu+1", v_activation="silu", output_gate=True),
        output_init="depth_scaled",
    ),
    "third activations": model(mixer(q_activation="elu+1", k_activation="silu", v_activation="relu")),
    "osam as published": model(
        osam(detach_state=True),
        {"ffn": NoFeedForwardSpec()},
        layout="1",
        norm=LayerNormSpec(placement="final", eps=1e-5),
        tie_embeddings=False,
        embedding_std=1.0,
        head_std=0.1,
    ),
    "osam, all options": model(
        osam(
            independent_hashes=True,
            sketch_values=False,
            frequencies=4,
            decay=True,
            time_scales=(1.25, 64.0),
            normalisation="rms",
            gate_cap=2.0,
            gate_start=0.0,
            hash_seed=7,
        )
    ),
    "osam spectral, dropout": model(osam(buckets=101, readout_hidden=10, dropout=0.1), layout="(1)x1"),
    "osam kupdate": model(osam(kupdate=3, detach_state=True)),
    "osam kupdate, registers": model(osam(kupdate=3), registers=3, layout="(1)x2"),
    "osam keys alone, registers": model(osam(value_path=False), registers=3),
    "osam decay, registers": model(osam(decay=True, frequencies=2), registers=3),
    "osam, share last kv": model(osam(), {"share_last_kv": True}),
    "osam, delta token": model(osam(), delta(values=2, compressor="token", embedding_conv=True)),
    "osam frozen, layer norm sandwich": model(
        osam(freeze_phase=True), norm=LayerNormSpec(placement="sandwich", eps=1e-5)
    ),
    "delta rule": model(delta_rule()),
    "delta rule, filter, registers": model(delta_rule(conv=4, num_heads=2, head_dim=9), registers=3),
    "delta rule, filter, share last kv": model(delta_rule(conv=3), {"share_last_kv": True}, registers=2),
    "delta rule behind the block of a loop, loop all": model(
        layout="1 (2)x2 1", loop=ALL_LOOP_PARTS, overrides=(other("2", mixer="delta_rule", ffn="none"),)
    ),
    "no feed-forward, layer norm": model(
        {"ffn": NoFeedForwardSpec()}, norm=LayerNormSpec(eps=1e-4, depth_scale=True), layout="1 (1)x2 1"
    ),
    "osam, loop all": model(osam(frequencies=2), loop=ALL_LOOP_PARTS),
    "one block": model(layout="(1)x3"),
    "two blocks": model(layout="(2)x2"),
    "two loops": model(layout="1 (1)x2 1 (2)x2 1"),
    "blocks that differ": model(
        layout="1 wide:(2)x2 1",
        overrides=(
            other("wide", ffn__intermediate_size=20, mixer__num_kv_heads=2, mixer__rope__base=300.0),
            other("2-3", norm__placement="sandwich", mixer__k_shift=True),
            other("0", mixer={"kind": "osam", "buckets": 30, "readout_hidden": 9, "detach_state": False}, ffn="none"),
        ),
    ),
    "blocks that differ, registers, delta token, share last kv": model(
        delta(values=2, compressor="token", embedding_conv=True),
        layout="1 (1)x3 1",
        registers=2,
        share_last_kv=True,
        overrides=(
            other("0", mixer={"kind": "latent_attention", "num_heads": 4}),
            other("1", mixer={"kind": "bottleneck_attention", "num_heads": 4, "cache": "latent"}),
        ),
    ),
    "u-net around a loop, scaled residual": model(
        layout="2 (1)x2 3", topology=UNetSpec(), residual=ScaledResidualSpec(stem_mix=True), registers=2, dropout=0.1
    ),
    "fewer skips, blocks visited again, attention options": model(
        mixer(num_kv_heads=2, exclusive=True, head_gate=True, value_residual=0.3, value_embedding=True),
        stem=(ValueEmbeddingSpec(width=6),),
        layout="a:2 (1)x2 a 1",
        topology=UNetSpec(skips=1),
        registers=2,
    ),
    "rotation by loop and context, depth scale, no gains": model(
        mixer(qk_norm="before_rope", qk_norm_gain=False, rope=RopeSpec(loop_scales=(9.0, 1.0), original_context=16)),
        norm=RMSNormSpec(gain=False, depth_scale=True),
        overrides=(other("1", norm__depth=7),),
        residual=ScaledResidualSpec(),
    ),
    "value embedding, registers": model(
        mixer(num_kv_heads=2, value_embedding=True, exclusive=True), stem=(ValueEmbeddingSpec(width=8),), registers=2
    ),
    "choke, tap": model(
        {"ffn": ChokeSpec(intermediate_size=48, choke_size=16)},
        layout="2 (1)x2 1",
        loop=(TapSpec(width=5),),
    ),
    "choke pyramid, tap of the deepest": model(
        {"ffn": ChokeSpec(shape="pyramid", intermediate_size=48, choke_size=16, loops=1)},
        layout="2 (1)x2 1",
        loop=(TapSpec(width=5, layers="deepest", per_loop=False),),
    ),
    "choke pyramid residual, tap of the first": model(
        {"ffn": ChokeSpec(shape="pyramid_residual", intermediate_size=48, choke_size=16)},
        layout="2 (1)x2 1",
        loop=(TapSpec(width=5, layers="first"),),
    ),
    "choke grouped, tap of chosen blocks": model(
        {"ffn": ChokeSpec(shape="grouped", intermediate_size=48, choke_size=16, groups=4)},
        layout="2 (1)x2 1",
        loop=(TapSpec(width=4, blocks=(1, 0)),),
    ),
    "choke residual": model(
        {
            "ffn": ChokeSpec(
                shape="residual", intermediate_size=40, choke_size=12, activation="leaky_relu2", negative_slope=0.3
            )
        },
        zero_init_outputs=True,
    ),
    "helix, registers": model(layout="1 second:1 1 second 1 second", topology=HelixSpec(bridge_width=5), registers=2),
    "helix by attention": model(
        layout="1 up:1 down:1 second:1 1 up down second 1",
        topology=HelixSpec(bridges="attention", merge="sigmoid", visit_embedding="halves", hint_cap=0.7),
        residual=ScaledResidualSpec(stem_mix=True),
        overrides=bridges(),
        registers=2,
    ),
    "helix with split heads": model(
        mixer(num_kv_heads=2, exclusive=True),
        layout="1 third:2 1 third 1",
        topology=HelixSpec(
            stream="third", merge="sigmoid", merge_cap=0.7, visit_embedding="each", skip_after_hint=True, skip_gate=True
        ),
        overrides=(
            other("third", mixer={"kind": "split", "num_heads": 4, "num_kv_heads": 2, "cross_heads": 2}),
            other("2", mixer__cross_heads=4),
        ),
    ),
    "controller, registers": modulated(parts.ControllerSpec(rank=3, style=5), layout="1 loop:(2)x2 1", registers=2),
    "controller of the prefix, frozen, registers": modulated(
        parts.ControllerSpec(rank=2, style=4, pooling="prefix", norm=False), alpha=3.0, layout="loop:(1)x3", registers=2
    ),
    "controller of the prompt, gate of the update": modulated(
        *(parts.ControllerSpec(rank=3, pooling="prompt", prompt=4, rows=2), UpdateGateSpec())
    ),
    "static diagonals, norm, halting": modulated(
        *(parts.StaticDiagonalsSpec(rank=3, rows=1), LoopNormSpec(eps=1e-3), HaltSpec(bias=-1.0)), layout="1 loop:(1)x3"
    ),
    "static cores, bases of each loop": modulated(
        parts.StaticCoresSpec(rank=3), layout="1 loop:(2)x2 1", gate="geglu", rows=2
    ),
    "controller of full cores, fewer bases than loops": modulated(
        parts.ControllerSpec(rank=3, style=5, core="full"), layout="loop:(1)x3 1", rows=2, alpha=3.0
    ),
    "static diagonals, dropout": model(
        {"mixer": parts.ModulatedAttentionSpec(rank=2), "ffn": parts.ModulatedFeedForwardSpec(rank=2, dropout=0.1)},
        loop(parts.StaticDiagonalsSpec(rank=2)),
        layout="(1)x2",
    ),
    "matrices from the loop, as a refiner, registers": generated(
        "1 loop:1 (loop)x2", LoopNormSpec(rows=2), RecurrenceGateSpec(), registers=2, pooling="prefix"
    ),
    "matrices from the loop, of each token": generated("1 loop:(1)x2"),
    "matrices from the loop, halting, prompt": generated(
        "loop:(2)x3 1", HaltSpec(hidden=5), confidence=3, rows=2, norm=False, pooling="prompt", prompt=4, bases=1
    ),
    "blocks run once and as a loop": model(
        loop(LoopEmbeddingSpec()), layout="1 a:2 1 (a)x2 a", topology=UNetSpec(skips=1)
    ),
    "halting, as published": model(loop(HaltSpec(bias=0.0, freeze=False, cost="steps", cost_weight=0.1))),
    "halting of single tokens, registers": model(
        mixer(num_kv_heads=2, exclusive=True, value_residual=0.3),
        layout="1 (2)x4 1",
        loop=(InjectionSpec(), HaltSpec(hidden=48, bias=0.0, cost="geometric", prior=0.4)),
        registers=2,
    ),
    "halting, latent cache, window": model(
        bottleneck(cache="latent", rope=RopeSpec(base=300.0)), loop(HaltSpec(hidden=48, bias=0.0)), layout="(1)x4 1"
    ),
    "halting, delta channel": model(delta(values=2), loop(HaltSpec(hidden=48, bias=0.0)), layout="(1)x4"),
    "halting, window, u-net": model(
        mixer(window=4), loop(HaltSpec(hidden=48, bias=0.0)), layout="1 (2)x3 1", topology=UNetSpec()
    ),
    "halting, constant state": model(osam(), loop(HaltSpec(hidden=48, bias=0.0)), layout="1 (1)x4"),
    "halting, controller": modulated(
        *(parts.ControllerSpec(rank=3), HyperSpec(streams=2), HaltSpec(hidden=48, bias=0.0)), layout="1 loop:(1)x3 1"
    ),
    "halting, share last kv": model({"share_last_kv": True}, loop(HaltSpec(hidden=48, bias=0.0)), layout="1 (1)x4"),
    "unequal loops": model(loop(LoopEmbeddingSpec(), LoopNormSpec(rows=3)), layout="(1)x2 1 (1)x4"),
}
