"""Options that another option switches on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ouroboros.config import ModelSpec
from ouroboros.config.needs import all_of, declared_untried, given, idle, needs, positive, several, untried
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.loop import LoopEmbeddingSpec
from ouroboros.config.parts.osam import OsamSpec


@dataclass(frozen=True)
class Inner:
    on: bool = False
    speed: int = field(default=1, metadata=needs("on", True))
    kind: str = "a"


@dataclass(frozen=True)
class Outer:
    size: int = 0
    mode: str = "x"
    inner: Inner = Inner()
    whole: Inner = field(default=Inner(), metadata=needs("size", positive))
    both: int = field(default=1, metadata=all_of(needs("mode", "y", "z"), needs("size", several)))
    words: int = field(default=1, metadata=needs("inner.on", True, say="something switched on"))
    parts: tuple[Inner, ...] = (Inner(kind="b"),)


def test_what_changes_nothing_and_what_it_needs() -> None:
    assert dict(idle(Outer())) == {
        "inner.speed": "inner.on = true",
        "whole.on": "size = more than 0",
        "whole.speed": "size = more than 0",
        "whole.kind": "size = more than 0",
        "both": "mode = y or z",
        "words": "something switched on",
        "parts.b.speed": "parts.b.on = true",
    }
    assert dict(idle(Outer(size=1, mode="y", inner=Inner(on=True), parts=()))) == {
        "whole.speed": "whole.on = true",
        "both": "size = more than 1",
    }
    assert dict(idle(Outer(size=2, mode="z", inner=Inner(on=True), whole=Inner(on=True), parts=()))) == {}


@dataclass(frozen=True)
class Seldom:
    kind: str = "c"
    rare: int = field(default=1, metadata=untried("acts on Sundays") | needs("kind", "d"))


@dataclass(frozen=True)
class Around:
    seldom: Seldom = Seldom()
    several: tuple[Seldom, ...] = (Seldom(),)


def test_what_a_short_trial_cannot_show_is_declared() -> None:
    why = "acts on Sundays"
    assert dict(declared_untried(Around())) == {"seldom.rare": why, "several.c.rare": why}
    assert dict(idle(Seldom())) == {"rare": "kind = d"}


@dataclass(frozen=True)
class Section:
    loops: Inner = field(default=Inner(on=True), metadata=needs("/outer.mode", "y"))


@dataclass(frozen=True)
class Whole:
    outer: Outer = Outer()
    section: Section = Section()


def test_what_another_section_makes_idle() -> None:
    found = {"loops.on": "outer.mode = y", "loops.speed": "outer.mode = y", "loops.kind": "outer.mode = y"}
    assert dict(idle(Section(), recipe=Whole())) == found
    assert {f"section.{path}": why for path, why in found.items()}.items() <= dict(idle(Whole())).items()
    assert dict(idle(Section(), recipe=Whole(outer=Outer(mode="y")))) == {}
    assert dict(idle(Section())) == {}  # there is no recipe around


def test_conditions() -> None:
    assert [positive(value) for value in (None, 0, 0.1)] == [False, False, True]
    assert [several(value) for value in (None, 1, 2)] == [False, False, True]
    assert [given(value) for value in (None, 0)] == [False, True]


def test_of_a_model() -> None:
    assert {"loop", "share_last_kv", "register_std"} <= dict(idle(ModelSpec())).keys()
    looped = dict(idle(ModelSpec(layout="(1)x2", registers=1, loop=(LoopEmbeddingSpec(),))))
    assert not any(name.startswith(("loop", "share_last_kv", "register_std")) for name in looped)
    vector = dict(idle(ModelSpec().replace(residual=DeltaSpec())))
    assert vector["block.residual.kernel"] == "block.residual.values = more than 1"
    memory = dict(idle(ModelSpec().replace(mixer=OsamSpec())))
    assert memory["block.mixer.time_scales"] == "block.mixer.decay = true"
