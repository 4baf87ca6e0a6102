"""Quantiles against published tables, units, and null and planted-effect simulations of the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.eval.stats import (
    UNIT_BYTES,
    Record,
    mean_interval,
    paired_difference,
    ratio_interval,
    student_quantile,
    unit_edges,
    unit_size,
    verdict_of,
)


@pytest.mark.parametrize(
    ("df", "expected"),
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (5, 2.570582),
        (10, 2.228139),
        (30, 2.042272),
        (200, 1.971896),
        (201, 1.971837),
        (1000, 1.962339),
    ],
)
def test_quantile_is_that_of_the_tables(df: int, expected: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(expected, abs=2e-6)


def test_quantiles_with_a_closed_form_are_exact() -> None:
    for probability in (0.5, 0.6, 0.9, 0.999):
        a = 2 * probability - 1
        assert student_quantile(probability, 1) == pytest.approx(math.tan(math.pi * a / 2), rel=1e-12, abs=1e-12)
        assert student_quantile(probability, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-12, abs=1e-12)
    with pytest.raises(OuroborosError, match="degrees of freedom"):
        student_quantile(0.9, 0)


@given(st.integers(0, 100_000), st.integers(0, 5000))
def test_units_cover_the_document_once_and_are_of_like_size(length: int, unit: int) -> None:
    edges = unit_edges(length, unit)
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == length and sizes.sum() == length
    assert sizes.max() - sizes.min() <= 1
    if unit == 0 or length < 2 * unit:
        assert len(sizes) == 1
    else:
        assert unit <= sizes.min() and sizes.max() <= 2 * unit


def test_documents_are_units_where_there_are_enough() -> None:
    assert unit_size([10] * 10) == 0
    assert unit_size([10] * 9) == unit_size([1] * 50 + [51]) == unit_size([]) == UNIT_BYTES


def test_ratio_interval_by_hand() -> None:
    # R = 6 / 6 = 1, residuals 1, -1, 0; se^2 = 3/2 * 2 / 36
    found = ratio_interval([2, 1, 3], [1, 2, 3])
    assert (found.mean, found.n) == (1.0, 3) and found.stderr == pytest.approx(math.sqrt(3 / 36))
    reach = 4.302653 * math.sqrt(3 / 36)
    assert found.bounds == pytest.approx((1 - reach, 1 + reach), abs=1e-6)
    alone = ratio_interval([5.0], [2])
    assert (alone.mean, alone.stderr, alone.bounds) == (2.5, None, None)


def test_what_was_found_as_json() -> None:
    @dataclass(frozen=True)
    class Found(Record):
        pair: tuple[int, int]
        array: np.ndarray = field(repr=False)

    assert Found((1, 2), np.zeros(3)).to_dict() == {"pair": [1, 2]}


def test_mean_interval_over_seeds() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.stderr == pytest.approx(1 / math.sqrt(3)) and found.n == 3
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    alone = mean_interval([1.5])
    assert (alone.stderr, alone.low, alone.high) == (None, None, None)
    assert alone.to_dict()["low"] is None
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(OuroborosError, match="finite"):
            mean_interval(bad)


def test_verdict() -> None:
    assert verdict_of(-2, -1) == "better"
    assert verdict_of(1, 2) == "worse"
    assert verdict_of(-1, 1) == verdict_of(0, 0) == verdict_of(None, None) == "cannot tell"


def fake_score(nats: np.ndarray, sizes: np.ndarray, **changes: Any) -> Any:
    facts = {"data_sha256": "d", "window": 8, "stride": 8, "unit_nats": nats, "unit_bytes": sizes}
    return SimpleNamespace(**facts | changes)


def simulated(rng: np.random.Generator, effect: float, units: int = 40) -> str:
    """Verdict on two models that share the text's difficulty and differ by noise and ``effect`` bits per byte."""
    sizes = rng.integers(2000, 8000, units)
    common = rng.gamma(4, 0.3, units)
    noise = rng.normal(0, 0.03, (2, units))
    nats = (common + noise + [[effect], [0]]) * sizes * math.log(2)
    return paired_difference(fake_score(nats[0], sizes), fake_score(nats[1], sizes)).verdict


def test_a_against_a_is_called_a_difference_about_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    found = [simulated(rng, 0.0) for _ in range(2000)]
    # Nominal 100 of 2000; the bounds are four standard deviations of a binomial.
    assert 60 <= sum(verdict != "cannot tell" for verdict in found) <= 140
    assert 20 <= found.count("better") <= 80


def test_a_planted_effect_is_detected_with_its_sign() -> None:
    rng = np.random.default_rng(1)
    for effect, verdict in ((-0.025, "better"), (0.025, "worse")):
        assert sum(simulated(rng, effect) == verdict for _ in range(200)) >= 160


def test_paired_difference_values() -> None:
    sizes = np.array([100, 100])
    one, two = fake_score(np.array([10.0, 20.0]), sizes), fake_score(np.array([11.0, 23.0]), sizes)
    found = paired_difference(one, two)
    assert found.delta == pytest.approx(-4 / 200 / math.log(2))
    # residuals -+1, t(1) = 12.7
    assert found.stderr == pytest.approx(2 / 200 / math.log(2))
    assert found.verdict == "cannot tell" and found.units == 2
    same = paired_difference(one, one)
    assert same.delta == same.stderr == 0 and same.verdict == "cannot tell"


@pytest.mark.parametrize("change", [{"data_sha256": "e"}, {"window": 9}, {"stride": 4}])
def test_scores_on_different_terms_are_refused(change: dict[str, Any]) -> None:
    one = fake_score(np.ones(3), np.full(3, 5))
    with pytest.raises(OuroborosError, match=next(iter(change))):
        paired_difference(one, fake_score(np.ones(3), np.full(3, 5), **change))


def test_different_units_are_refused() -> None:
    with pytest.raises(OuroborosError, match="units"):
        paired_difference(fake_score(np.ones(3), np.full(3, 5)), fake_score(np.ones(2), np.full(2, 5)))
