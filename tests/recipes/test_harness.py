"""Every recipe, and every option of a model, passes the harness."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from typing import Any

import pytest

from ouroboros.config import AttentionSpec, FeedForwardSpec, LoopSpec, ModelSpec, NormSpec, RopeSpec
from ouroboros.eval.harness import CHECKS, run_harness
from ouroboros.recipes import RECIPES, recipe

BASE = ModelSpec(
    layout="1 (1)x2 1",
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


def ffn(**changes: Any) -> ModelSpec:
    """The base with another feed-forward network."""
    return dataclasses.replace(BASE, ffn=dataclasses.replace(BASE.ffn, **changes))


def loop(**changes: Any) -> ModelSpec:
    """The base with loop parts."""
    return dataclasses.replace(BASE, loop=LoopSpec(**changes))


def model(**changes: Any) -> ModelSpec:
    """The base with other surroundings."""
    return dataclasses.replace(BASE, **changes)


VARIANTS = {
    "registers": model(registers=3),
    "gqa": mixer(num_kv_heads=2),
    "one kv head": mixer(num_kv_heads=1, head_dim=12),
    "biases": mixer(qkv_bias=True, out_bias=True),
    "qk norm before": mixer(qk_norm="before_rope", query_gain=1.5),
    "qk norm after": mixer(qk_norm="after_rope"),
    "rope off": mixer(rope=RopeSpec(fraction=0.0)),
    "rope half": mixer(rope=RopeSpec(fraction=0.5, base=500.0)),
    "rope scaled": mixer(rope=RopeSpec(scale=4.0)),
    "swiglu bias": ffn(kind="swiglu", bias=True),
    "relu2": ffn(kind="relu2", bias=True),
    "leaky relu2": ffn(kind="leaky_relu2", bias=True, negative_slope=0.3),
    "gelu": ffn(kind="gelu", bias=True),
    "sandwich": model(norm=NormSpec(placement="sandwich", eps=1e-5)),
    "loop norm": loop(norm=True),
    "loop embedding": loop(embedding=True, max_loops=3),
    "loop inject add": loop(inject="add"),
    "loop inject concat": loop(inject="concat"),
    "loop gate": loop(gate=True, gate_bias=-1.0),
    "loop contractive": loop(contractive=0.5),
    "loop all": dataclasses.replace(BASE, loop=ALL_LOOP_PARTS),
    "loop all, registers, gqa": dataclasses.replace(mixer(num_kv_heads=2), loop=ALL_LOOP_PARTS, registers=2),
    "share last kv": loop(share_last_kv=True),
    "share last kv, registers": dataclasses.replace(loop(share_last_kv=True), layout="1 (2)x3 1", registers=2),
    "logits": model(logit_scale=0.5, logit_softcap=5.0),
    "untied": model(tie_embeddings=False, embedding_norm=True),
    "dropout": model(dropout=0.1),
    "attention dropout": mixer(dropout=0.2),
    "zero outputs": model(zero_init_outputs=True, init_std=0.05),
    "plain": model(layout="3"),
    "one block, one loop": model(layout="(1)x1"),
    "one block": model(layout="(1)x3"),
    "two blocks": model(layout="(2)x2"),
    "two loops": model(layout="1 (1)x2 1 (2)x2 1"),
    "unequal loops": dataclasses.replace(loop(embedding=True), layout="(1)x2 1 (1)x4"),
}


def failures(findings: list[Any]) -> list[str]:
    """The failed findings as text."""
    return [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe(name: str) -> None:
    findings = run_harness(recipe(name, "tiny"))
    assert failures(findings) == []
    compiled = next(finding for finding in findings if finding.name == "torch.compile")
    assert ("skipped" in compiled.detail) == (not any(map(shutil.which, ("g++", "clang++", "c++"))))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    findings = run_harness(VARIANTS[name], quick=True)
    assert failures(findings) == []
    assert [finding.name for finding in findings] == list(CHECKS)


def test_checks_are_skipped_only_where_they_say_nothing() -> None:
    def skipped(spec: ModelSpec) -> set[str]:
        return {f.name for f in run_harness(spec, quick=True) if f.detail.startswith("skipped")}

    assert skipped(BASE) == {"torch.compile"}
    assert skipped(VARIANTS["plain"]) == {"torch.compile", "loop counts", "neutral parts"}
    assert skipped(VARIANTS["share last kv"]) == {"torch.compile", "chunked prefill"}


def options(cls: Any, values: list[Any], path: str = "") -> dict[str, set[Any]]:
    """Which values each leaf field of ``cls`` takes among ``values``."""
    found: dict[str, set[Any]] = {}
    for field in dataclasses.fields(cls):
        members = [getattr(value, field.name) for value in values]
        if dataclasses.is_dataclass(members[0]):
            found |= options(type(members[0]), members, f"{path}{field.name}.")
        else:
            found[path + field.name] = set(members)
    return found


def test_variants_cover_every_option() -> None:
    """A field of the model that no variant changes, or a choice that none makes, is untested."""
    sizes = {"vocab_size", "hidden_size", "max_position_embeddings", "ffn.intermediate_size", "mixer.num_heads"}
    one_choice = {"residual", "mixer.kind"}
    taken = options(ModelSpec, [BASE, *VARIANTS.values()])
    unchanged = {name for name, values in taken.items() if len(values) < 2}
    assert unchanged == sizes | one_choice
    for cls, prefix in ((ModelSpec, ""), (AttentionSpec, "mixer."), (FeedForwardSpec, "ffn."), (LoopSpec, "loop.")):
        for name, hint in typing.get_type_hints(cls).items():
            if typing.get_origin(hint) is typing.Literal:
                assert taken[prefix + name] == set(typing.get_args(hint)), prefix + name
