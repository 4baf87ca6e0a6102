"""Intervals and verdicts for bits per byte: ratio estimator, paired difference, Student intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ouroboros.errors import OuroborosError

if TYPE_CHECKING:
    from ouroboros.eval.score import Score

Verdict = Literal["better", "worse", "cannot tell"]

UNIT_BYTES = 4096
"""Bytes of text that make one unit of an interval where documents are cut."""
MIN_DOCUMENTS = 10
"""With at least so many documents, none more than half of the text, each document is one unit."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its standard error and two-sided confidence interval (``None`` when n < 2)."""

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """``a - b`` of two scores on the same text, in bits per byte; negative means that ``a`` is better."""

    delta: float
    stderr: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    """About ``a``: the interval lies below 0 (better), above 0 (worse), or contains it (cannot tell)."""
    units: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def unit_size(lengths: Sequence[int], unit_bytes: int | None = None) -> int:
    """Bytes of a unit for documents of these lengths; 0 for whole documents. ``unit_bytes`` is taken if given.

    Whole documents are the honest units for saying how a score varies over new documents, because the pieces of
    one document are alike (on Python files the standard error over whole files is twice that over 4 KiB pieces).
    Where there are too few documents for that, pieces are all there is.
    """
    if unit_bytes is not None:
        return unit_bytes
    return 0 if len(lengths) >= MIN_DOCUMENTS and max(lengths) <= sum(lengths) / 2 else UNIT_BYTES


def unit_edges(length: int, unit_bytes: int = UNIT_BYTES) -> np.ndarray:
    """Byte offsets that cut a document of ``length`` bytes into near-equal units.

    Returns int64[units + 1] from 0 to ``length``; each unit has between ``unit_bytes`` and twice that many
    bytes, a document shorter than that is one unit, and 0 keeps every document whole. The cut depends on the
    length alone, not on tokens or windows, so the units of two models with different tokenizers are the same.
    """
    count = max(1, length // unit_bytes) if unit_bytes else 1
    return np.arange(count + 1, dtype=np.int64) * length // count


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with integer ``df`` degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    theta = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = (cosine, cosine if df > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


def student_quantile(probability: float, df: int) -> float:
    """The ``probability`` quantile of Student's t with integer ``df`` >= 1 degrees of freedom.

    By bisection of :func:`student_cdf` up to 200 degrees of freedom; beyond that the first two terms of
    Abramowitz & Stegun 26.7.5, whose error there is below 1e-6.
    """
    if df < 1:
        raise OuroborosError(f"degrees of freedom must be >= 1, got {df}")
    z = NormalDist().inv_cdf(probability)
    if df > 200:
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    if probability < 0.5:
        return -student_quantile(1 - probability, df)
    low, high = 0.0, 1.0
    while student_cdf(high, df) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2


def ratio_stderr(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> float | None:
    """Standard error of ``sum(y) / sum(x)`` over n clusters, or ``None`` when n < 2.

    The linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed., eq. 6.13, without the finite
    population correction): with ``R = sum(y) / sum(x)`` and residuals ``e_i = y_i - R x_i``,
    ``se^2 = n / (n - 1) * sum(e_i^2) / sum(x)^2``. Tokens inside a cluster may be correlated; clusters are
    taken as independent.
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n = len(y)
    if n < 2:
        return None
    residual = y - y.sum() / x.sum() * x
    return float(math.sqrt(n / (n - 1) * np.square(residual).sum()) / x.sum())


def bounds(
    mean: float, stderr: float | None, n: int, confidence: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """Two-sided Student interval ``mean -+ t(n - 1) * stderr``; ``(None, None)`` without a standard error."""
    if stderr is None:
        return None, None
    reach = student_quantile(0.5 + confidence / 2, n - 1) * stderr
    return mean - reach, mean + reach


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student interval of the mean of independent values, for example one bits-per-byte figure per seed.

    Raises:
        OuroborosError: no values, or a value that is not finite.
    """
    data = np.asarray(values, np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise OuroborosError("an interval needs at least one value and only finite values")
    mean, n = float(data.mean()), int(data.size)
    stderr = float(data.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    low, high = bounds(mean, stderr, n, confidence)
    return Interval(mean=mean, stderr=stderr, low=low, high=high, n=n)


def verdict_of(low: float | None, high: float | None) -> Verdict:
    """``better`` when the interval of ``a - b`` lies below 0, ``worse`` above 0, else ``cannot tell``."""
    if low is None or high is None:
        return "cannot tell"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "cannot tell"


def paired_difference(a: Score, b: Score, confidence: float = 0.95) -> Difference:
    """Difference ``a - b`` in bits per byte on identical units, by the ratio estimator of the nats' difference.

    Pairing removes what both models find hard, so the interval is far narrower than that of either score.
    It says how the difference would vary over text like these units; it says nothing about training seeds
    (use :func:`mean_interval` over the deltas of several seeds for that).

    Raises:
        OuroborosError: the scores differ in text, window, stride or units, so they cannot be compared.
    """
    for name in ("data_sha256", "window", "stride"):
        left, right = getattr(a, name), getattr(b, name)
        if left != right:
            raise OuroborosError(f"scores cannot be compared: {name} differs ({left} and {right}); score both alike")
    if not np.array_equal(a.unit_bytes, b.unit_bytes):
        raise OuroborosError("scores cannot be compared: their units differ; score both with one unit_bytes setting")
    nats = (np.asarray(a.unit_nats) - np.asarray(b.unit_nats)) / math.log(2)
    total, n = float(a.unit_bytes.sum()), len(nats)
    delta, stderr = float(nats.sum()) / total, ratio_stderr(nats, a.unit_bytes)
    low, high = bounds(delta, stderr, n, confidence)
    return Difference(delta=delta, stderr=stderr, low=low, high=high, verdict=verdict_of(low, high), units=n)
