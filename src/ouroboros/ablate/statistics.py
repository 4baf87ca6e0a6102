"""What paired runs allow to say: differences over seeds and text, intervals, many arms, noise, ranks.

An arm and its control are trained with the same seeds, which decide the start and the order of the text, and are
scored on the same units of held-out text. So each seed has one difference for every unit, and two things vary: a new
seed would give another difference, and so would another text. Both are in the interval.

Shapes: S seeds, U units of text, R bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ouroboros.errors import OuroborosError, check
from ouroboros.eval.stats import (
    CONFIDENCE,
    Numbers,
    Record,
    Verdict,
    mean_interval,
    ratio_interval,
    student_inside,
    student_quantile,
    verdict_of,
)

if TYPE_CHECKING:
    from ouroboros.ablate.record import Measured, Result

Outcome = Literal["win", "loss", "cannot tell"]
_WORDS: dict[Verdict, Outcome] = {"better": "win", "worse": "loss", "cannot tell": "cannot tell"}

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Paired(Record):
    """An arm minus its control, in bits per byte; negative means that the arm is better."""

    difference: float
    """The mean over seeds."""
    low: float | None
    high: float | None
    """95 % Student interval for new seeds and new text; None with fewer than two seeds."""
    bootstrap_low: float | None
    bootstrap_high: float | None
    """95 % bootstrap interval of the same. With few seeds it is too narrow, which is why it decides nothing."""
    p_value: float | None
    """Two-sided, that there is no difference; None with fewer than two seeds."""
    verdict: Outcome
    """About the arm: the Student interval lies below 0 (win), above 0 (loss), or contains it."""
    by_seed: tuple[float, ...]
    """The difference of each seed."""
    seeds: int
    units: int
    """Pieces of held-out text. A single one says nothing about other text, and then the interval is about seeds
    alone."""


class Spread(NamedTuple):
    """A standard error and its degrees of freedom."""

    stderr: float
    df: int


def paired(arm: Sequence[Numbers], control: Sequence[Numbers], unit_bytes: Numbers) -> Paired:
    """The difference of two arms that were trained with the same seeds.

    Args:
        arm: for each seed the bits that every unit of text took, S times float64[U].
        control: the same of the control.
        unit_bytes: bytes of the units, int64[U].

    Raises:
        OuroborosError: no seed, a seed or a unit that only one of the two has, or bits that are not finite.
    """
    check(
        len(arm) == len(control) > 0,
        f"pairs need both arms of every seed: there are {len(arm)} and {len(control)} runs",
    )
    bytes_U = np.asarray(unit_bytes, np.float64)
    sound = all(np.shape(bits) == bytes_U.shape for bits in (*arm, *control))
    check(sound, "pairs need the same units of text: the numbers of units differ")
    bits_SU = np.asarray(arm, np.float64) - np.asarray(control, np.float64)
    check(bool(np.isfinite(bits_SU).all()), "pairs need finite scores: one of the runs has bits that are not a number")
    by_seed = bits_SU.sum(1) / bytes_U.sum()
    mean, seeds, units = float(by_seed.mean()), *bits_SU.shape
    if seeds < 2:
        low = high = p_value = None
        sampled: tuple[float | None, float | None] = None, None
    else:
        error = spread(bits_SU, bytes_U)
        reach = student_quantile(0.5 + CONFIDENCE / 2, error.df) * error.stderr
        low, high, p_value = mean - reach, mean + reach, _p_value(mean, error)
        sampled = bootstrap(bits_SU, bytes_U)
    return Paired(
        difference=mean,
        low=low,
        high=high,
        bootstrap_low=sampled[0],
        bootstrap_high=sampled[1],
        p_value=p_value,
        verdict=_WORDS[verdict_of(low, high)],
        by_seed=tuple(map(float, by_seed)),
        seeds=seeds,
        units=units,
    )


def paired_runs(arm: Sequence[Result], control: Sequence[Result], *, packed: bool = False) -> Paired:
    """The difference of an arm and its control from their runs, one of each seed, in any order.

    Args:
        arm, control: runs that may be compared (:func:`ouroboros.ablate.record.check_comparable`).
        packed: compare what their packed files score.

    Raises:
        OuroborosError: a seed that only one of the two has; names it.
    """
    runs = [{result.seed: result for result in results} for results in (arm, control)]
    for seed in sorted(runs[0].keys() ^ runs[1].keys()):
        lacks, has = (arm, control) if seed in runs[1] else (control, arm)
        raise OuroborosError(
            f"seed {seed} is missing of arm {lacks[0].arm if lacks else ''!r}, and arm {has[0].arm!r} has it: they make"
            " no pair"
        )
    first, second = ([_score(by_seed[seed], packed) for seed in sorted(by_seed)] for by_seed in runs)
    check(bool(first), "pairs need both arms of every seed: there are no runs")
    bits = [[np.asarray(score.unit_nats) / math.log(2) for score in scores] for scores in (first, second)]
    return paired(bits[0], bits[1], first[0].unit_bytes)


def _score(result: Result, packed: bool) -> Measured:
    if not packed:
        return result.score
    if result.packed is None:
        raise OuroborosError(f"{result.cell}: was not packed, so packed files cannot be compared")
    return result.packed.score


def spread(bits_SU: np.ndarray, bytes_U: np.ndarray) -> Spread:
    """How far the mean difference lies from that of all seeds and all text like this.

    The variance over seeds, measured on one text, and that over units of the seeds' mean are added, as in a random
    effects model with seeds and units crossed. The degrees of freedom are those of the seeds, S - 1, which are the
    fewest that any share of the two variances can have, so no interval is too narrow. Satterthwaite's (1946), from the
    measured shares, are more wherever a few seeds agree by chance, and then many arms have false finds among them.
    """
    over_seeds = mean_interval(bits_SU.sum(1) / bytes_U.sum()).stderr or 0.0
    over_units = ratio_interval(bits_SU.mean(0), bytes_U).stderr or 0.0
    return Spread(math.hypot(over_seeds, over_units), bits_SU.shape[0] - 1)


def _p_value(mean: float, error: Spread) -> float:
    if error.stderr == 0:
        return float(mean == 0)
    return 1 - student_inside(abs(mean) / error.stderr, error.df)


def bootstrap(bits_SU: np.ndarray, bytes_U: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval by percentiles (Efron 1979): each sample draws seeds, and then units, with replacement."""
    draw = np.random.default_rng(seed)
    seeds, units = bits_SU.shape
    seeds_RS = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    means = np.empty(RESAMPLES)
    for number, weight_S in enumerate(seeds_RS):  # one after the other, because there may be many units
        weight_U = np.bincount(draw.integers(units, size=units), minlength=units)
        means[number] = weight_S @ bits_SU @ weight_U / (seeds * (weight_U @ bytes_U))
    low, high = np.quantile(means, (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): at 0.05 the chance of any false find among all is 5 %."""
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True, kw_only=True)
class Floor(Record):
    """What repeated runs of one recipe differ by, in bits per byte."""

    deviation: float
    """Standard deviation of one run."""
    difference: float
    """The smallest difference of two means over so many seeds that would be seen if pairing brought nothing."""
    runs: int


def noise_floor(scores: Numbers, seeds: int) -> Floor:
    """The noise of single runs, from repetitions of the control with different seeds.

    Args:
        scores: bits per byte of each repetition.
        seeds: how many each arm of a study has.

    Raises:
        OuroborosError: fewer than two repetitions or seeds.
    """
    check(len(scores) >= 2 and seeds >= 2, "a noise floor needs at least two runs of the control, and two seeds")
    deviation = float(np.std(np.asarray(scores, np.float64), ddof=1))
    quantile = student_quantile(0.5 + CONFIDENCE / 2, 2 * seeds - 2)
    return Floor(deviation=deviation, difference=quantile * deviation * math.sqrt(2 / seeds), runs=len(scores))


def kendall_tau(first: Numbers, second: Numbers) -> float | None:
    """How far two stages rank the same arms alike: 1 for the same order, -1 for the opposite one (Kendall's tau-b).

    None where there are fewer than two arms, or a stage has all of them equal.

    Raises:
        OuroborosError: the numbers of arms differ.
    """
    check(len(first) == len(second), f"ranks of the same arms are compared: there are {len(first)} and {len(second)}")
    one, two = (np.sign(np.subtract.outer(values, values)) for values in map(np.asarray, (first, second)))
    size = math.sqrt(float(np.square(one).sum()) * float(np.square(two).sum()))
    return float((one * two).sum()) / size if size else None
