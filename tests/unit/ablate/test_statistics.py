"""Intervals by hand, and simulations of many comparisons: how often nothing is called a win, and a gain is seen."""

import functools
import math

import numpy as np
import pytest

from ouroboros.ablate.statistics import Spread, bootstrap, holm, kendall_tau, noise_floor, paired, spread
from ouroboros.errors import OuroborosError
from ouroboros.eval.stats import student_inside, student_quantile

UNITS = 12
BYTES = np.full(UNITS, 4096.0)
MIXED = (0.004, 0.004, 0.006)
"""Standard deviations, in bits per byte: of seeds, of units, and of both together."""

quantile = functools.cache(functools.partial(student_quantile, 0.975))


def simulated(draw: np.random.Generator, seeds: int, gain: float = 0.0, noise: tuple = MIXED) -> np.ndarray:
    """Differences in bits, float64[seeds, units]: an effect of the seed, one of the unit, and one of both."""
    shapes = (seeds, 1), (1, UNITS), (seeds, UNITS)
    return (sum(draw.normal(0, size, shape) for size, shape in zip(noise, shapes)) - gain) * BYTES


def inside(distance: float, error: Spread) -> float:
    """The probability that a difference is within this distance of zero where there is none."""
    return student_inside(distance / error.stderr, error.df)


def outcomes(seeds: int, gain: float, trials: int, noise: tuple = MIXED) -> tuple[float, float]:
    """The shares of wins and of losses by the Student interval."""
    draw, wins, losses = np.random.default_rng(seeds), 0, 0
    for _ in range(trials):
        bits_SU = simulated(draw, seeds, gain, noise)
        error, mean = spread(bits_SU, BYTES), bits_SU.mean() / 4096
        reach = quantile(error.df) * error.stderr
        wins, losses = wins + int(mean < -reach), losses + int(mean > reach)
    return wins / trials, losses / trials


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [MIXED, (0.004, 0, 0), (0, 0.01, 0.01)])
def test_without_an_effect_fewer_than_one_comparison_in_twenty_is_a_win(seeds, noise):
    wins, losses = outcomes(seeds, 0.0, 500, noise)
    assert wins <= 0.05 and losses <= 0.05
    assert wins + losses > 0 or noise[1]  # where seeds alone vary the interval has no slack


def test_an_effect_is_seen_and_more_seeds_see_it_more_often():
    """A gain of 0.012 bits per byte, three times what seeds differ by."""
    three, five = outcomes(3, 0.012, 200)[0], outcomes(5, 0.012, 200)[0]
    assert 0.4 < three < five and five > 0.9
    assert outcomes(5, -0.012, 200)[0] == 0


def test_the_bootstrap_is_near_the_student_interval_with_many_seeds_and_too_narrow_with_few():
    draw = np.random.default_rng(1)
    for seeds, low, high in ((3, 0.15, 0.9), (30, 0.8, 1.2)):
        ratios = []
        for _ in range(4):
            bits_SU = simulated(draw, seeds)
            error, (left, right) = spread(bits_SU, BYTES), bootstrap(bits_SU, BYTES)
            assert left < bits_SU.mean() / 4096 < right
            ratios.append((right - left) / (2 * quantile(error.df) * error.stderr))
        assert low < np.mean(ratios) < high
    assert bootstrap(bits_SU, BYTES) == bootstrap(bits_SU, BYTES)


def test_a_pair_by_hand():
    # Per seed 0.5 and 1.5 bits per byte; units differ by as much: 0.5 and 1.5.
    arm, control = [[10, 10], [20, 30]], [[10, 0], [10, 10]]
    found = paired(arm, control, [10, 10])
    assert found.by_seed == (0.5, 1.5) and found.difference == 1.0 and (found.seeds, found.units) == (2, 2)
    # Both standard errors are 1/2: together 1/sqrt(2), with the one degree of freedom that two seeds have.
    reach = 12.706205 * math.sqrt(0.5)
    assert (found.low, found.high) == pytest.approx((1 - reach, 1 + reach), abs=1e-5)
    t = math.sqrt(2)  # the distribution with one degree of freedom is Cauchy's
    assert found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(t)) and found.verdict == "cannot tell"


def test_verdicts():
    worse, better = [[12.0, 12.1]] * 3, [[10.0, 10.1]] * 3
    assert paired(worse, better, [9, 9]).verdict == "loss" and paired(better, worse, [9, 9]).verdict == "win"
    alone = paired(better[:1], worse[:1], [9, 9])
    assert alone.verdict == "cannot tell" and alone.low is None and alone.p_value is None and alone.difference < 0


def test_a_recipe_against_itself_is_no_win():
    same = paired([[3.0, 4.0]] * 2, [[3.0, 4.0]] * 2, [2, 2])
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1) and same.verdict == "cannot tell"


def test_one_unit_of_text_leaves_the_seeds():
    found = paired([[1.0], [2.0], [3.0]], [[1.0], [1.0], [1.0]], [1])
    reach = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((1 - reach, 1 + reach), abs=1e-5)


@pytest.mark.parametrize(
    ("arm", "control", "words"),
    [
        ([[1.0, 2.0]], [], "1 and 0 runs"),
        ([], [], "0 and 0 runs"),
        ([[1.0, 2.0]], [[1.0]], "same units"),
        ([[1.0, math.nan]], [[1.0, 2.0]], "not a number"),
    ],
)
def test_what_is_no_pair_is_refused(arm, control, words):
    with pytest.raises(OuroborosError, match=words):
        paired(arm, control, [1, 1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [MIXED, (0.008, 0.006, 0.006), (0.006, 0, 0)])
def test_studies_of_many_arms_without_an_effect_seldom_have_a_find_among_them(seeds, noise):
    """Arms as a study has them: each has noise of its own, and all have the same control."""
    draw, arms, studies, found = np.random.default_rng(3), 19, 100, 0
    for _ in range(studies):
        runs = [simulated(draw, seeds, noise=noise) / math.sqrt(2) for _ in range(arms + 1)]
        pairs = [run - runs[0] for run in runs[1:]]
        p_values = [1 - inside(abs(pair.sum()) / BYTES.sum() / seeds, spread(pair, BYTES)) for pair in pairs]
        found += min(holm(p_values)) < 0.05
    assert found / studies <= 0.06


def test_the_noise_floor_by_hand():
    floor = noise_floor([1.0, 2.0, 3.0], seeds=2)
    assert floor.deviation == 1.0 and floor.runs == 3 and floor.difference == pytest.approx(4.302653, abs=1e-5)
    with pytest.raises(OuroborosError, match="two runs"):
        noise_floor([1.0], seeds=2)


def test_ranks():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert kendall_tau([1, 1], [1, 2]) is None and kendall_tau([1], [1]) is None
    with pytest.raises(OuroborosError, match="2 and 1"):
        kendall_tau([1, 2], [1])
