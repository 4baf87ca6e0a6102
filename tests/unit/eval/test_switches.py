"""Options are found with other values, and what each of these changes is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec, RopeSpec
from ouroboros.config.parts.loop import LoopEmbeddingSpec, RecurrenceGateSpec
from ouroboros.errors import OuroborosError, check
from ouroboros.eval.switches import WIDTHS, another, behaviour, effect, model_switches, narrow, options, switches

BASE = ModelSpec(layout="1 (1)x2", vocab_size=19, hidden_size=32, max_position_embeddings=40).replace(
    ffn=FeedForwardSpec(intermediate_size=24)
)


@dataclass(frozen=True)
class Inner:
    depth: int = 2


@dataclass(frozen=True)
class Outer:
    count: int = 1
    inner: Inner = field(default_factory=Inner)
    name: str = "x"
    off: Inner | None = None
    pair: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self) -> None:
        check(self.count < 2, "count must be < 2")


def test_options_and_their_other_values() -> None:
    found: dict[str, list[Any]] = {}
    for name, changed in options(Outer(), {"pair": ((1.0,),)}):
        found.setdefault(name, []).append(changed)
    assert [str(error) for error in found["count"]] == ["count must be < 2"] * 2
    assert found["inner.depth"] == [Outer(inner=Inner(3)), Outer(inner=Inner(4))]
    assert isinstance(found["name"][0], OuroborosError) and len(found["name"]) == 1
    assert found["off"] == [Outer(off=Inner())] and found["pair"] == [Outer(pair=(1.0,))]


@pytest.mark.parametrize(
    ("hint", "value", "others"),
    [
        (bool, True, [False]),
        (Literal["a", "b", "c"], "b", ["a", "c"]),
        (int, 3, [4, 6]),
        (int | None, None, [2, 6, 1, 0]),
        (float | None, None, [2.0, 6.0, 1.0, 0.0]),
        (Literal["a"] | None, None, ["a"]),
        (str, "x", []),
        (tuple[int, ...], (1, 2), [(2, 4)]),
    ],
)
def test_another_value(hint: Any, value: Any, others: list[Any]) -> None:
    assert list(another(hint, value)) == others


def test_parts_in_lists_and_overrides_are_options() -> None:
    loop = (LoopEmbeddingSpec(), RecurrenceGateSpec(bias=0.5))
    override = BlockOverride(where="0", set={"ffn.intermediate_size": 8})
    spec = BASE.replace(loop=loop, overrides=(override,))
    changed = dict(options(spec))
    assert changed["loop.gate.bias"].loop == (loop[0], RecurrenceGateSpec(bias=0.75))
    assert changed["overrides.0"] == dataclasses.replace(spec, overrides=())
    named = {switch.name: switch.acts for switch in model_switches(spec)}
    assert named["model.loop.gate.bias"] == "start" and named["model.overrides.0"] == "function"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"layout": "1 (1)x3"}, "function"),
        ({"mixer": AttentionSpec(num_heads=2)}, "function"),
        ({"max_position_embeddings": 41}, None),
        ({"share_last_kv": True}, "cost"),
        ({"init_std": 0.3}, "start"),
        ({"dropout": 0.1}, "training"),
    ],
)
def test_what_a_change_changes(changes: dict[str, Any], what: str | None) -> None:
    before = behaviour(BASE)
    assert effect(before, behaviour(BASE.replace(**changes), before)) == what


def test_one_value_without_effect_counts_more_than_another_that_is_refused() -> None:
    def nothing(spec: Any) -> None:
        return None

    found = {switch.name: switch for switch in switches(Outer(count=0), nothing, idle={"inner": "a depth"})}
    assert found["count"].dead and found["pair"].dead
    assert (found["name"].dead, found["name"].why) == (False, "not tried: no other value of it is known")
    assert (found["inner.depth"].dead, found["inner.depth"].why) == (False, "needs a depth")
    limit = {switch.name: switch for switch in switches(BASE, nothing, idle={})}["max_position_embeddings"]
    assert (limit.dead, limit.why) == (False, "declared: it limits the length of a text")
    wanted = [switch.name for switch in switches(Outer(count=0), nothing, idle={}, prefix="a.", among={"a.count"})]
    assert wanted == ["a.count"]


def test_models_are_tried_narrow_and_wider_where_that_shows_nothing() -> None:
    heads = AttentionSpec(num_heads=16, rope=RopeSpec(base=100.0))
    wide = BASE.replace(hidden_size=512, mixer=heads)
    assert narrow(wide).hidden_size == WIDTHS[0] and narrow(wide, least=100).hidden_size == 128
    assert narrow(BASE.replace(hidden_size=8, mixer=AttentionSpec(num_heads=2))).hidden_size == 8
    # A head of two channels turns at one frequency, whatever the base is.
    found = {switch.name: switch for switch in model_switches(wide)}
    assert found["model.block.mixer.rope.base"].acts == "function"
