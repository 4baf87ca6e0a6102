"""Order, rate and reward as published; recorded numbers are in tests/golden."""

from __future__ import annotations

import pytest

from ouroboros.systems.controller.pipeline import answer, interleaved, rate, reward, windows


def test_windows_share_one_id_and_leave_out_the_rest() -> None:
    assert list(windows([[1, 2, 3], [], [4, 5, 6]], 2)) == [[1, 2, 3], [3, 4, 5]]


def test_a_stream_that_has_ended_is_not_drawn_again() -> None:
    drawn = list(interleaved([[1, 2], [10, 20, 30]], [1.0, 2.0], seed=0))
    assert sorted(drawn) == [1, 2, 10, 20, 30] and [x for x in drawn if x > 9] == [10, 20, 30]
    assert drawn == list(interleaved([[1, 2], [10, 20, 30]], [1.0, 2.0], seed=0))


def test_rate_hardly_falls() -> None:
    """The published setting: 124 updates of warm-up, and at the end 99 % of the peak."""
    rates = [
        rate(update, peak=3e-4, least=1e-6, warmup=2000, total=300_000, accumulation=16) for update in range(1, 18_751)
    ]
    assert max(range(len(rates)), key=rates.__getitem__) + 1 in (124, 125)
    assert rates[0] == pytest.approx(2.4e-6) and 0.98 < rates[-1] / 3e-4 < 0.99


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so #### 1,234 apples", "1234"),
        ("#### -0.5", "-0.5"),
        (r"it is \boxed{x} and \boxed{y}", "x"),
        (r"\boxed{1} #### 2", "2"),
        ("42", None),
    ],
)
def test_answers(text: str, expected: str | None) -> None:
    assert answer(text) == expected


def test_rewards() -> None:
    assert reward("#### 2.0", "#### 2") == 1 and reward(r"\boxed{a b}", "a b") == 1
    assert reward("#### 3", "#### 4") == 0 and reward("2", "2") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so she has 1,234.", "1234"),
        ("that is 5-3 = 2 apples", "2"),
        ("of 10-12", "12"),
        ("it falls by -3.5", "-3.5"),
        ("1, 2, 3", "3"),
        ("$.50", ".50"),
        ("#### 7, not 8", "7"),
        (r"\boxed{9} of 10", "9"),
        ("none", None),
    ],
)
def test_plain_answers_are_last_numbers_where_none_is_marked(text: str, expected: str | None) -> None:
    assert answer(text, plain=True) == expected


def test_plain_rewards_read_the_reference_as_before() -> None:
    assert reward("It is 18.", "9 * 2 = 18\n#### 18", plain=True) == 1 and reward("It is 18.", "#### 18") == 0
    assert reward("It is 18.", "19 and 18", plain=True) == 0  # a reference without a marked answer is it as a whole
