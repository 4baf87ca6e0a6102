"""Every recipe, and every option of a model, passes the harness."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from variants import BASE, VARIANTS

from ouroboros.config import (
    AttentionSpec,
    BlockSpec,
    ModelSpec,
)
from ouroboros.config.part import family, is_family, kinds
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.eval.harness import CHECKS, run_harness
from ouroboros.recipes import RECIPES, recipe


def failures(findings: list[Any]) -> list[str]:
    """The failed findings as text."""
    return [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]


COMPILED = {
    "loop": "1 (1)x2",
    "controller": "1 loop:(1)x2",
    "helix": "1 crawler:1 1 crawler",
    "delta": "1",
    "osam": "1",
    "rhrm": "(1)x2",
}
"""One recipe for each kind of block, in the shortest layout that has what is its own: compilers are slow."""


FOUND = {
    "crawler-published": ["gradients: no gradient: model.stem.unconnected_values.scale"],
    # Every position sees the mean over all.
    "controller-published": [
        *("causal", "cached == uncached", "chunked prefill", "static cache", "beam search", "hidden states"),
        "loop counts",
    ],
}
FOUND["controller-first-published"] = [
    *FOUND["controller-published"],
    "gradients: gradient is all zero: model.decoder.loops.0.matrix_controller.halt_proj.weight",
]
"""What is wrong with recipes that are as published: how the failures begin."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe(name: str) -> None:
    found, expected = failures(run_harness(recipe(name, "tiny"), quick=True)), FOUND.get(name, [])
    assert [text[: len(start)] for text, start in zip(found, expected, strict=False)] == expected
    assert len(found) == len(expected), found


def test_the_published_pooling_is_named_as_not_causal() -> None:
    causal = run_harness(recipe("controller-published", "tiny"), quick=True)[0]
    assert causal.name == "causal" and not causal.ok
    assert "pooling 'all', as published, is not causal" in causal.detail


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
    expected |= {"chunked prefill"} if spec.share_last_kv else set()
    skipped = {finding.name for finding in findings if finding.detail.startswith("skipped")}
    assert skipped == expected, "checks are skipped only where they say nothing"


def specifications(value: Any) -> Iterator[Any]:
    """Every specification within ``value``, itself included."""
    if isinstance(value, tuple):
        for item in value:
            yield from specifications(item)
    elif dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from specifications(getattr(value, field.name))


def owner(cls: type, name: str) -> type:
    """The part that an option belongs to: where a part extends another one, the first that has it."""
    if name == "kind":
        return cls
    parts = [base for base in cls.__mro__ if getattr(base, "kind", None) is not None]
    return [base for base in [cls, *parts] if name in {field.name for field in dataclasses.fields(base)}][-1]


def settings(models: list[ModelSpec]) -> dict[tuple[type, str], set[str]]:
    """Every value of each option in any of ``models``."""
    taken: dict[tuple[type, str], set[str]] = {}
    for spec in (spec for model in models for spec in (*specifications(model), *model.parts)):
        for name in (field.name for field in dataclasses.fields(spec)):
            taken.setdefault((owner(type(spec), name), name), set()).add(repr(getattr(spec, name)))
    return taken


def test_variants_cover_every_option() -> None:
    """A part that no variant has, a field that none changes, or a choice that none makes, is untested."""
    published = [recipe(name, "tiny").model for name in FOUND]
    taken, elsewhere = settings([BASE, *VARIANTS.values()]), settings(published)
    models = (BASE, *VARIANTS.values(), *published)
    present = {(family(type(spec)), spec.kind) for model in models for spec in model.parts}
    hints = {**typing.get_type_hints(ModelSpec), **typing.get_type_hints(BlockSpec)}.values()
    families = {of for hint in hints for of in (hint, *typing.get_args(hint)) if is_family(of)}
    assert present == {(of, kind) for of in families for kind in kinds(of)} and len(families) == 8
    same = {f"{cls.__name__}.{name}" for (cls, name), values in taken.items() if len(values) < 2 and name != "kind"}
    sizes = {"ModelSpec.vocab_size", "ModelSpec.hidden_size", "ModelSpec.max_position_embeddings"}
    heads = {f"{cls.__name__}.num_heads" for cls in (AttentionSpec, LatentAttentionSpec, BottleneckAttentionSpec)}
    published = {"MatrixControllerSpec.start"}  # its other choice never learns, so that no variant can have it
    assert same == sizes | heads | published
    for cls, name in taken:
        hint = typing.get_type_hints(cls)[name]
        if typing.get_origin(hint) is typing.Literal:
            found = taken[cls, name] | elsewhere.get((cls, name), set())
            assert found == {repr(choice) for choice in typing.get_args(hint)}, (cls, name)
