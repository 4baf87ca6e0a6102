"""Schedule notation: properties of what parses, and one clear line for what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.schedule import Schedule, Segment, Visit, parse

pieces = st.one_of(
    st.tuples(st.integers(1, 9), st.none()), st.tuples(st.integers(1, 9), st.integers(1, 9))
)  # (blocks, loops or None for a plain run)
layouts = st.lists(pieces, min_size=1, max_size=6).map(
    lambda parts: " ".join(str(blocks) if loops is None else f"({blocks})x{loops}" for blocks, loops in parts)
)


@given(layouts)
def test_notation_round_trip(layout: str) -> None:
    assert parse(layout).notation == layout
    assert parse(parse(layout).notation) == parse(layout)


@given(layouts, st.sampled_from(["", " ", "   ", "\t"]))
def test_spaces_are_free(layout: str, space: str) -> None:
    loose = layout.replace("(", f"{space}( ").replace(")x", f"{space})  x{space}")
    assert parse(f" {loose} ") == parse(layout)


@given(layouts)
def test_visits(layout: str) -> None:
    schedule = parse(layout)
    visits = schedule.visits
    assert [visit.slot for visit in visits] == list(range(schedule.num_visits))
    assert sorted({visit.block for visit in visits}) == list(range(schedule.num_blocks))
    seen: dict[int, int] = {}
    for visit in visits:
        assert visit.loop == seen.get(visit.block, 0)
        seen[visit.block] = visit.loop + 1
    first_uses = list(dict.fromkeys(visit.block for visit in visits))
    assert first_uses == sorted(first_uses)
    assert schedule.loops == max(seen.values())
    assert schedule.is_looped == ("(" in layout)


@given(layouts, st.integers(1, 12))
def test_with_loops(layout: str, loops: int) -> None:
    schedule = parse(layout)
    if not schedule.is_looped:
        with pytest.raises(OuroborosError, match="has no loop"):
            schedule.with_loops(loops)
        return
    other = schedule.with_loops(loops)
    assert other.num_blocks == schedule.num_blocks
    assert [segment.blocks for segment in other.segments] == [segment.blocks for segment in schedule.segments]
    assert all(segment.loops == (loops if segment.looped else 1) for segment in other.segments)
    assert other.loops == loops
    assert parse(other.notation) == other


def test_examples() -> None:
    assert parse("12").num_blocks == parse("12").num_visits == 12
    assert (parse("(1)x8").num_blocks, parse("(1)x8").num_visits) == (1, 8)
    assert parse("8 (1)x8 8").num_visits == 24
    assert parse("(2)x2").visits == (Visit(0, 0, 0), Visit(1, 1, 0), Visit(2, 0, 1), Visit(3, 1, 1))
    assert parse("1 (2)x2") == Schedule((Segment(0, 1, 1, False), Segment(1, 2, 2, True)))
    assert [visit.block for visit in parse("1 (2)x2 1").visits] == [0, 1, 2, 1, 2, 3]


def test_named_segments() -> None:
    schedule = parse("1 wide:(2)x3 end: 2")
    assert [segment.name for segment in schedule.segments] == ["", "wide", "end"]
    assert schedule.notation == "1 wide:(2)x3 end:2" and parse(schedule.notation) == schedule
    assert schedule.with_loops(4).notation == "1 wide:(2)x4 end:2"
    assert schedule.visits == parse("1 (2)x3 2").visits


@pytest.mark.parametrize(
    ("layout", "blocks", "loops"),
    [
        ("a:2 3 a", [0, 1, 2, 3, 4, 0, 1], [0, 0, 0, 0, 0, 1, 1]),
        ("1 s:1 1 s 1 s", [0, 1, 2, 1, 3, 1], [0, 0, 0, 1, 0, 2]),
        ("a:(1)x3 b:1 a b a", [0, 0, 0, 1, 0, 1, 0], [0, 1, 2, 0, 3, 1, 4]),
    ],
)
def test_named_segments_are_visited_again(layout: str, blocks: list[int], loops: list[int]) -> None:
    schedule = parse(layout)
    assert [visit.block for visit in schedule.visits] == blocks
    assert [visit.loop for visit in schedule.visits] == loops
    assert schedule.num_visits == len(blocks) and schedule.num_blocks == len(set(blocks))
    assert sum(segment.num_blocks for segment in schedule.stored) == schedule.num_blocks
    assert schedule.last_slots == {len(blocks) - 1 - blocks[::-1].index(block) for block in set(blocks)}
    assert schedule.notation == layout and parse(schedule.notation) == schedule
    assert schedule.blocks_at(layout[layout.index(":") - 1]) == schedule.stored[layout[0] == "1"].blocks


def test_blocks_run_once_and_then_as_a_loop() -> None:
    schedule = parse("1 last:2 ( last ) x 2 last")
    assert schedule.notation == "1 last:2 (last)x2 last" and parse(schedule.notation) == schedule
    assert [visit.block for visit in schedule.visits] == [0, 1, 2, 1, 2, 1, 2, 1, 2]
    assert [visit.loop for visit in schedule.visits] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert [segment.looped for segment in schedule.segments] == [False, False, True, False] and schedule.num_blocks == 3
    assert schedule.loops == 2 and schedule.with_loops(5).notation == "1 last:2 (last)x5 last"
    assert schedule.blocks_at("last") == range(1, 3)


def test_visited_again_without_its_loop() -> None:
    schedule = parse("a:(2)x3 1 a")
    assert schedule.with_loops(5).notation == "a:(2)x5 1 a"
    assert [segment.looped for segment in schedule.segments] == [True, False, False] and schedule.loops == 3
    assert not parse("a:2 a").is_looped
    with pytest.raises(OuroborosError, match="'a:2 a' has no loop"):
        parse("a:2 a").with_loops(2)


@pytest.mark.parametrize(
    ("where", "blocks"),
    [("wide", range(1, 3)), ("end", range(3, 5)), ("0", range(1)), ("2-4", range(2, 5)), ("3-3", range(3, 4))],
)
def test_blocks_by_name_number_and_range(where: str, blocks: range) -> None:
    assert parse("1 wide:(2)x3 end:2").blocks_at(where) == blocks


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("narrow", r"has no segment 'narrow' \(wide, end\)"),
        ("", "has no segment ''"),
        ("5", "has blocks 0 to 4, not 5"),
        ("3-2", "has blocks 0 to 4, not 3-2"),
        ("0-9", "has blocks 0 to 4, not 0-9"),
    ],
)
def test_blocks_that_are_not_there(where: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        parse("1 wide:(2)x3 end:2").blocks_at(where)
    with pytest.raises(OuroborosError, match=r"no segment 'x' \(none is named\)"):
        parse("3").blocks_at("x")


def test_a_loop_of_one_is_still_a_loop() -> None:
    assert parse("(3)x1").is_looped and not parse("3").is_looped
    assert parse("(3)x1").with_loops(4).notation == "(3)x4"


@pytest.mark.parametrize(
    ("layout", "column", "what"),
    [
        ("", 1, "is empty; write blocks or a loop, not nested, as in '6'"),
        ("   ", 4, "is empty"),
        ("0", 1, "the number of blocks must be at least 1"),
        ("(2)x0", 5, "the number of loops must be at least 1"),
        ("1 (0)x2", 4, "the number of blocks must be at least 1"),
        ("((1)x2", 1, "unexpected '((1)x2'; write blocks or a loop, not nested"),
        ("(1)x2)", 6, "unexpected ')'"),
        ("(1", 1, "unexpected '(1'"),
        ("2 (1)", 3, "unexpected '(1)'"),
        ("(1) 2", 1, "unexpected"),
        ("()x2", 1, "unexpected"),
        ("2 x3", 3, "unexpected 'x3'"),
        ("-1", 1, "unexpected '-1'"),
        ("1.5", 2, "unexpected '.5'"),
        ("2 two", 3, "no segment before it is named 'two'"),
        ("(1)x2 (2)y3", 7, "unexpected '(2)y3'"),
        ("a a:2", 1, "no segment before it is named 'a'"),
        ("1 (a)x2 a:1", 3, "no segment before it is named 'a'"),
        ("a:1 b:(a)x2", 5, "the blocks of 'a' have a name: leave 'b' out"),
        ("a:1 (a)x0", 9, "the number of loops must be at least 1"),
        ("a:1 (a)", 5, "unexpected '(a)'"),
        ("a:2 a:2", 5, "the name 'a' is given twice"),
        ("a:60000 a", 9, "more than 100000 visits"),
        ("(1)x999999999", 1, "more than 100000 visits"),
        ("5 99999999999999999999", 3, "more than 100000 visits"),
        ("a:1 a:(1)x2", 5, "the name 'a' is given twice"),
        ("1 a:", 3, "unexpected 'a:'"),
        ("a:b:1", 1, "unexpected 'a:b:1'"),
    ],
)
def test_bad_layouts(layout: str, column: int, what: str) -> None:
    with pytest.raises(OuroborosError) as caught:
        parse(layout)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"layout {layout!r}, column {column}: ")
    with pytest.raises(OuroborosError, match=what.replace("(", r"\(").replace(")", r"\)")):
        parse(layout)


@given(st.text(alphabet="0123456789()x .-\n", max_size=12))
def test_any_text_parses_or_is_a_one_line_error(layout: str) -> None:
    try:
        assert parse(layout).num_visits >= 1
    except OuroborosError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("loops", [0, -3])
def test_loops_below_one(loops: int) -> None:
    with pytest.raises(OuroborosError, match=f"loops must be >= 1, got {loops}"):
        parse("(1)x2").with_loops(loops)
