"""Every recipe, and every option of a model, passes the harness."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from typing import Any

import pytest

from ouroboros.config import (
    AttentionSpec,
    BottleneckAttentionSpec,
    DeltaSpec,
    FeedForwardSpec,
    LatentAttentionSpec,
    LoopSpec,
    MixerSpec,
    ModelSpec,
    NormSpec,
    OsamSpec,
    RopeSpec,
)
from ouroboros.eval.harness import CHECKS, run_harness
from ouroboros.recipes import RECIPES, recipe

BASE = ModelSpec(
    layout="1 (1)x2",
    vocab_size=67,
    hidden_size=32,
    max_position_embeddings=64,
    mixer=AttentionSpec(num_heads=4),
    ffn=FeedForwardSpec(intermediate_size=48),
)
ALL_LOOP_PARTS = LoopSpec(norm=True, embedding=True, inject="concat", gate=True, contractive=0.5)


def mixer(**changes: Any) -> ModelSpec:
    """The base with other attention."""
    return dataclasses.replace(BASE, mixer=dataclasses.replace(BASE.mixer, **changes))


def latent(**changes: Any) -> ModelSpec:
    """The base with latent attention."""
    return dataclasses.replace(BASE, mixer=LatentAttentionSpec(num_heads=4, **changes))


def bottleneck(**changes: Any) -> ModelSpec:
    """The base with attention through a bottleneck."""
    return dataclasses.replace(BASE, mixer=BottleneckAttentionSpec(num_heads=4, **changes))


def osam(**changes: Any) -> ModelSpec:
    """The base with a memory of constant size, in every gradient."""
    options = {"buckets": 300, "readout_hidden": 24, "detach_state": False}
    return dataclasses.replace(BASE, mixer=OsamSpec(**{**options, **changes}))


def ffn(**changes: Any) -> ModelSpec:
    """The base with another feed-forward network."""
    return dataclasses.replace(BASE, ffn=dataclasses.replace(BASE.ffn, **changes))


def loop(**changes: Any) -> ModelSpec:
    """The base with loop parts."""
    return dataclasses.replace(BASE, loop=LoopSpec(**changes))


def delta(**changes: Any) -> ModelSpec:
    """The base with the delta residual."""
    return dataclasses.replace(BASE, residual="delta", delta=DeltaSpec(**changes))


def model(**changes: Any) -> ModelSpec:
    """The base with other surroundings."""
    return dataclasses.replace(BASE, **changes)


def combined(*specs: ModelSpec, **changes: Any) -> ModelSpec:
    """The base with every field in which one of ``specs`` differs from it."""
    differing = {
        field.name: getattr(spec, field.name)
        for spec in specs
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(BASE, field.name)
    }
    return dataclasses.replace(BASE, **differing | changes)


# Options that do not touch each other share a variant, because each variant takes half a second.
VARIANTS = {
    "registers": model(registers=3),
    "gqa, swiglu bias": combined(mixer(num_kv_heads=2), ffn(kind="swiglu", bias=True)),
    "one kv head, relu2": combined(mixer(num_kv_heads=1, head_dim=12), ffn(kind="relu2", bias=True)),
    "biases, sandwich": combined(mixer(qkv_bias=True, out_bias=True), norm=NormSpec(placement="sandwich", eps=1e-5)),
    "qk norm before, leaky relu2": combined(
        mixer(qk_norm="before_rope", query_gain=1.5), ffn(kind="leaky_relu2", bias=True, negative_slope=0.3)
    ),
    "qk norm after, gelu": combined(mixer(qk_norm="after_rope"), ffn(kind="gelu", bias=True)),
    "rope off, logits": combined(mixer(rope=RopeSpec(fraction=0.0)), logit_scale=0.5, logit_softcap=5.0),
    "rope half, untied": combined(
        mixer(rope=RopeSpec(fraction=0.5, base=500.0)), tie_embeddings=False, embedding_norm=True
    ),
    "rope scaled, zero outputs": combined(mixer(rope=RopeSpec(scale=4.0)), zero_init_outputs=True, init_std=0.05),
    "loop norm": loop(norm=True),
    "loop embedding": loop(embedding=True, max_loops=3),
    "loop inject add": loop(inject="add"),
    "loop inject concat": loop(inject="concat"),
    "loop gate": loop(gate=True, gate_bias=-1.0),
    "loop contractive": loop(contractive=0.5),
    "loop all": model(loop=ALL_LOOP_PARTS),
    "loop all, registers, gqa": combined(mixer(num_kv_heads=2), loop=ALL_LOOP_PARTS, registers=2),
    "share last kv": loop(share_last_kv=True),
    "share last kv, registers": combined(loop(share_last_kv=True), layout="1 (2)x3 1", registers=2),
    "key and value shift, output gate": combined(
        mixer(k_shift=True, v_shift=True, output_gate=True, q_activation="silu", k_activation="elu+1"),
        output_init="depth_scaled",
    ),
    "key shift, head norm, registers, gqa": combined(
        mixer(num_kv_heads=2, k_shift=True, head_norm=True, q_activation="relu", v_activation="silu"), registers=3
    ),
    "value shift, head norm and gate": mixer(v_shift=True, head_norm=True, output_gate=True, v_activation="relu"),
    "activations of queries and keys": combined(
        mixer(q_activation="elu+1", k_activation="silu", v_activation="elu+1"), embedding_std=0.1
    ),
    "relu of keys": combined(mixer(k_activation="relu"), layout="2"),
    "dropout": combined(ffn(dropout=0.1), dropout=0.1, layout="3"),
    "feed-forward dropout": combined(ffn(dropout=0.1), layout="(1)x1"),
    "attention dropout": combined(mixer(dropout=0.2), layout="(1)x1"),
    "latent": latent(),
    "latent, registers": combined(latent(query_rank=0, rope_dim=6, head_dim=10), registers=3, register_std=1.0),
    "latent sizes, dropout": combined(
        latent(kv_rank=7, query_rank=5, dropout=0.1, rope=RopeSpec(base=300.0, fraction=0.5, scale=2.0)), layout="3"
    ),
    "latent, share last kv": combined(latent(), loop(share_last_kv=True)),
    "bottleneck": bottleneck(),
    "bottleneck, latent cache": combined(bottleneck(cache="latent", latent_rank=6), registers=3),
    "bottleneck, dropout": combined(
        bottleneck(head_dim=10, dropout=0.1, rope=RopeSpec(base=300.0, fraction=0.5, scale=2.0)), layout="3"
    ),
    "learned positions": combined(bottleneck(qk_norm="none"), positions="learned", registers=2),
    "delta": delta(value_scale=2.0),
    "delta linear, sandwich": combined(
        delta(value="linear", guard="clamped", eps=1e-3, beta_init=0.5), norm=NormSpec(placement="sandwich")
    ),
    "delta constant, dropout": combined(
        delta(gate="two_layer", gate_hidden=12, value="constant", value_constant=1.5, erase=False), dropout=0.1
    ),
    "delta channel, loop all": combined(delta(values=3, kernel=5), loop=ALL_LOOP_PARTS),
    "delta channel, embedding filter": combined(
        delta(values=4, embedding_conv=True, embedding_kernel=6), registers=2, embedding_norm=True
    ),
    "delta token": delta(values=2, compressor="token"),
    "delta token, latent, dropout": combined(
        delta(values=2, compressor="token", kernel=3, compressor_init="normal"), latent(), layout="3", dropout=0.1
    ),
    "delta token, loop all": combined(
        delta(values=3, compressor="token", embedding_conv=True),
        mixer(k_shift=True, v_shift=True, num_kv_heads=2),
        loop=ALL_LOOP_PARTS,
        registers=2,
        norm=NormSpec(placement="sandwich"),
    ),
    "delta token, learned positions": combined(
        delta(values=2, compressor="token", kernel=2, embedding_conv=True),
        bottleneck(cache="latent"),
        positions="learned",
        registers=5,
    ),
    "delta token, share last kv": combined(
        delta(values=2, compressor="token", embedding_conv=True), loop(share_last_kv=True), registers=2
    ),
    "shifts": mixer(k_shift=True, v_shift=True),
    "activations, head norm": combined(
        mixer(q_activation="silu", k_activation="relu", v_activation="elu+1", head_norm=True), embedding_std=0.5
    ),
    "other activations, gate": combined(
        mixer(q_activation="relu", k_activation="elu+1", v_activation="silu", output_gate=True),
        output_init="depth_scaled",
    ),
    "third activations": mixer(q_activation="elu+1", k_activation="silu", v_activation="relu"),
    "osam as published": combined(
        osam(detach_state=True, freq_cache=True),
        ffn(kind="none"),
        layout="1",
        norm=NormSpec(kind="layer", placement="final", eps=1e-5),
        tie_embeddings=False,
        embedding_std=1.0,
        head_std=0.1,
    ),
    "osam, all options": osam(
        independent_hashes=True,
        sketch_values=False,
        frequencies=4,
        decay=True,
        time_scales=(1.25, 64.0),
        normalisation="rms",
        gate_cap=2.0,
        gate_start=0.0,
        hash_seed=7,
    ),
    "osam spectral, dropout": combined(osam(buckets=101, readout_hidden=10, dropout=0.1), layout="(1)x1"),
    "osam kupdate": osam(kupdate=3, detach_state=True),
    "osam kupdate, registers": combined(osam(kupdate=3), registers=3, layout="(1)x2"),
    "osam keys alone, registers": combined(osam(value_path=False), registers=3),
    "osam decay, registers": combined(osam(decay=True, frequencies=2), registers=3),
    "osam, share last kv": combined(osam(), loop(share_last_kv=True)),
    "osam, delta token": combined(osam(), delta(values=2, compressor="token", embedding_conv=True)),
    "osam frozen, layer norm sandwich": combined(
        osam(freeze_phase=True), norm=NormSpec(kind="layer", placement="sandwich", eps=1e-5)
    ),
    "no feed-forward, layer norm": combined(
        ffn(kind="none"), norm=NormSpec(kind="layer", eps=1e-4), layout="1 (1)x2 1"
    ),
    "osam, loop all": combined(osam(frequencies=2), loop=ALL_LOOP_PARTS),
    "one block": model(layout="(1)x3"),
    "two blocks": model(layout="(2)x2"),
    "two loops": model(layout="1 (1)x2 1 (2)x2 1"),
    "unequal loops": combined(loop(embedding=True), layout="(1)x2 1 (1)x4"),
}


def failures(findings: list[Any]) -> list[str]:
    """The failed findings as text."""
    return [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]


COMPILED = {"loop": "1 (1)x2", "delta": "1", "osam": "1", "rhrm": "(1)x2"}
"""One recipe for each kind of block, in the shortest layout that has what is its own: compilers are slow."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe(name: str) -> None:
    assert failures(run_harness(recipe(name, "tiny"), quick=True)) == []


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    spec = dataclasses.replace(recipe(name, "tiny").model, layout=COMPILED[name])
    findings = run_harness(spec)
    assert failures(findings) == []
    compiled = next(finding for finding in findings if finding.name == "torch.compile")
    assert ("skipped" in compiled.detail) == (not any(map(shutil.which, ("g++", "clang++", "c++"))))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    spec = VARIANTS[name]
    findings = run_harness(spec, quick=True)
    assert failures(findings) == []
    assert [finding.name for finding in findings] == list(CHECKS)
    expected = {"torch.compile"}
    expected |= set() if "(" in spec.layout else {"loop counts", "neutral parts"}
    expected |= {"chunked prefill"} if spec.loop.share_last_kv else set()
    skipped = {finding.name for finding in findings if finding.detail.startswith("skipped")}
    assert skipped == expected, "checks are skipped only where they say nothing"


def options(cls: Any, values: list[Any], path: str = "") -> dict[str, set[Any]]:
    """Which values each leaf field of ``cls`` takes among ``values``; a field of several classes is one of each."""
    found: dict[str, set[Any]] = {}
    for field in dataclasses.fields(cls):
        members = [getattr(value, field.name) for value in values]
        if not dataclasses.is_dataclass(members[0]):
            found[path + field.name] = set(members)
            continue
        kinds = {type(member) for member in members}
        for kind in kinds:
            place = f"{path}{field.name}." if len(kinds) == 1 else f"{kind.__name__}."
            found |= options(kind, [member for member in members if type(member) is kind], place)
    return found


def test_variants_cover_every_option() -> None:
    """A field of the model that no variant changes, or a choice that none makes, is untested."""
    mixers = typing.get_args(MixerSpec)
    sizes = {"vocab_size", "hidden_size", "max_position_embeddings", "ffn.intermediate_size"}
    one_choice = set()
    for kind in mixers:
        sizes |= {f"{kind.__name__}.num_heads"} if kind is not OsamSpec else set()
        one_choice.add(f"{kind.__name__}.kind")
    taken = options(ModelSpec, [BASE, *VARIANTS.values()])
    unchanged = {name for name, values in taken.items() if len(values) < 2}
    assert unchanged == sizes | one_choice
    classes = [
        (ModelSpec, ""),
        (FeedForwardSpec, "ffn."),
        (LoopSpec, "loop."),
        (NormSpec, "norm."),
        (DeltaSpec, "delta."),
    ]
    for cls, prefix in (*classes, *((kind, f"{kind.__name__}.") for kind in mixers)):
        for name, hint in typing.get_type_hints(cls).items():
            if typing.get_origin(hint) is typing.Literal:
                assert taken[prefix + name] == set(typing.get_args(hint)), prefix + name
