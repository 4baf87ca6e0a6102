"""Loop counts: distribution, bounds, and independence of everything but the seed and the step."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import LoopTraining
from ouroboros.schedule import parse
from ouroboros.train.sampler import LoopSampler

LOOPED = parse("1 (1)x2 1")


def draws(count: int, seed: int = 0, **spec) -> list[int]:
    sampler = LoopSampler(LoopTraining(**spec), LOOPED, seed)
    return [sampler.loops(step, 0.5) for step in range(count)]


def test_fixed_and_plain_layouts_keep_the_layouts_own_count():
    assert draws(5) == [None] * 5
    plain = LoopSampler(LoopTraining(sampling="uniform", max=4), parse("3"), 0)
    assert [plain.loops(step, 0.0) for step in range(5)] == [None] * 5


def test_uniform_draws_every_count_alike():
    counts = Counter(draws(4000, sampling="uniform", min=2, max=5))
    assert set(counts) == {2, 3, 4, 5} and all(850 < n < 1150 for n in counts.values())


def test_poisson_has_its_mean_and_bounds():
    wide = draws(4000, sampling="poisson", mean=4.0, min=1, max=50)
    mean = sum(wide) / len(wide)
    variance = sum((n - mean) ** 2 for n in wide) / len(wide)
    assert 3.9 < mean < 4.1 and 2.7 < variance < 3.3 and min(wide) == 1  # 1 + Poisson(3)
    assert set(draws(500, sampling="poisson", mean=4.0, min=2, max=5)) == {2, 3, 4, 5}
    assert set(draws(50, sampling="poisson", mean=1.0)) == {1}


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9), st.floats(0, 1))
def test_a_draw_depends_on_seed_and_step_alone(seed, step, progress):
    spec = LoopTraining(sampling="uniform", min=1, max=1000)
    fresh, used = (LoopSampler(spec, LOOPED, seed) for _ in range(2))
    used.loops(step + 1, 0.3)
    assert fresh.loops(step, progress) == used.loops(step, 0.9)


def test_seeds_and_steps_give_different_draws():
    spec = {"sampling": "uniform", "min": 1, "max": 1000}
    assert draws(20, seed=1, **spec) != draws(20, seed=2, **spec)
    assert len(set(draws(20, **spec))) > 15


@pytest.mark.parametrize(("progress", "loops"), [(0.0, 1), (0.34, 1), (0.35, 2), (0.8, 4), (1.0, 4)])
def test_the_curriculum_follows_progress(progress, loops):
    spec = LoopTraining(curriculum=((0.0, 1), (0.35, 2), (0.8, 4)))
    assert LoopSampler(spec, LOOPED, 0).loops(7, progress) == loops
