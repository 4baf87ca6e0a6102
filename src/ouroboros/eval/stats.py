"""Intervals and verdicts for bits per byte: ratio estimator, paired difference, Student intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.eval.score import Score

Verdict = Literal["better", "worse", "cannot tell"]
Numbers = Sequence[float] | np.ndarray

UNIT_BYTES = 4096
"""Bytes of text that make one unit of an interval where documents are cut."""
MIN_DOCUMENTS = 10
"""With at least so many documents, none more than half of the text, each document is one unit."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Record:
    """What was found, for people and for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of all fields but the arrays, which have no place in a ``repr`` either."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A mean with its standard error and two-sided 95 % confidence interval (``None`` when n < 2)."""

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """``a - b`` of two scores on the same text, in bits per byte; negative means that ``a`` is better."""

    delta: float
    stderr: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    """About ``a``: the interval lies below 0 (better), above 0 (worse), or contains it (cannot tell)."""
    units: int


def unit_size(lengths: Sequence[int]) -> int:
    """Bytes of a unit for documents of these lengths; 0 for whole documents.

    Whole documents say how a score varies over new documents, because the pieces of one document are alike (on Python
    files the standard error over whole files is twice that over 4 KiB pieces). Of few documents there are only pieces.
    """
    return 0 if len(lengths) >= MIN_DOCUMENTS and max(lengths) <= sum(lengths) / 2 else UNIT_BYTES


def unit_edges(length: int, unit_bytes: int = UNIT_BYTES) -> np.ndarray:
    """Byte offsets, int64[units + 1] from 0 to ``length``, that cut a document of so many bytes into near-equal units.

    Each unit has between ``unit_bytes`` and twice that many bytes, a shorter document is one unit, and 0 keeps every
    document whole. The cut depends on the length alone, so models with different tokenizers have the same units.
    """
    count = max(1, length // unit_bytes) if unit_bytes else 1
    return np.arange(count + 1, dtype=np.int64) * length // count


def student_quantile(probability: float, df: int) -> float:
    """The quantile of Student's t at a ``probability`` of at least 1/2, for integer ``df`` >= 1 degrees of freedom.

    By bisection of the distribution function (Abramowitz & Stegun 26.7.3, 26.7.4) up to 200 degrees of freedom; beyond
    that the first two terms of 26.7.5, whose error there is below 1e-6.
    """
    check(df >= 1, f"degrees of freedom must be >= 1, got {df}")
    if df > 200:
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, df) < 2 * probability - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def student_inside(distance: float, df: int) -> float:
    """The probability that Student's t with ``df`` >= 1 degrees of freedom is within ``distance`` of 0 (A&S 26.7.3,
    26.7.4)."""
    check(df >= 1, f"degrees of freedom must be >= 1, got {df}")
    return _inside(math.atan(distance / math.sqrt(df)), df)


def _inside(theta: float, df: int) -> float:
    """P(|T| <= sqrt(df) tan(theta))."""
    sine, cosine, odd = math.sin(theta), math.cos(theta), df % 2
    term, total = (cosine, cosine if df > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def ratio_interval(numerators: Numbers, denominators: Numbers) -> Interval:
    """``R = sum(y) / sum(x)`` over n clusters, taken as independent, with its standard error and Student interval.

    The linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed., eq. 6.13, without the finite population
    correction): ``se^2 = n / (n - 1) * sum((y_i - R x_i)^2) / sum(x)^2``.
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio, n = float(y.sum() / x.sum()), len(y)
    if n < 2:
        return Interval(mean=ratio, stderr=None, low=None, high=None, n=n)
    stderr = float(math.sqrt(n / (n - 1) * np.square(y - ratio * x).sum()) / x.sum())
    reach = student_quantile(0.5 + CONFIDENCE / 2, n - 1) * stderr
    return Interval(mean=ratio, stderr=stderr, low=ratio - reach, high=ratio + reach, n=n)


def mean_interval(values: Numbers) -> Interval:
    """Student interval of the mean of independent values, for example one bits-per-byte figure per seed.

    Raises:
        OuroborosError: no values, or a value that is not finite.
    """
    data = np.asarray(values, np.float64)
    sound = data.size > 0 and bool(np.isfinite(data).all())
    check(sound, "an interval needs at least one value and only finite values")
    return ratio_interval(data, np.ones_like(data))


def verdict_of(low: float | None, high: float | None) -> Verdict:
    """``better`` when the interval of ``a - b`` lies below 0, ``worse`` above 0, else ``cannot tell``."""
    if low is None or high is None:
        return "cannot tell"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "cannot tell"


def paired_difference(a: Score, b: Score) -> Difference:
    """Difference ``a - b`` in bits per byte on identical units, by the ratio estimator of the nats' difference.

    Pairing removes what both models find hard, so the interval is far narrower than that of either score. It says
    nothing about training seeds: for that use :func:`mean_interval` over the deltas of several.

    Raises:
        OuroborosError: the scores differ in text, window or stride, so they cannot be compared.
    """
    for name in ("data_sha256", "window", "stride"):
        left, right = getattr(a, name), getattr(b, name)
        check(left == right, f"scores cannot be compared: {name} differs ({left} and {right}); score both alike")
    check(np.array_equal(a.unit_bytes, b.unit_bytes), "scores cannot be compared: their units differ")
    found = ratio_interval((np.asarray(a.unit_nats) - np.asarray(b.unit_nats)) / math.log(2), a.unit_bytes)
    facts = found.to_dict()
    verdict = verdict_of(found.low, found.high)
    return Difference(delta=facts.pop("mean"), units=facts.pop("n"), verdict=verdict, **facts)
