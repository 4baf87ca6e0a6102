"""Loop counts and noise in the inputs: how they are distributed, and what they depend on."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import LoopTraining
from ouroboros.schedule import parse
from ouroboros.train.draws import Corruption, LoopSampler

EOS, UNKNOWN = 5, 10
SPECIAL = (EOS, UNKNOWN)
TEXT = 9
"""Tokens of a vocabulary of 11 that are text."""
LOOPED = parse("1 (1)x2 1")


def draws(count: int, seed: int = 0, **spec) -> list[int]:
    sampler = LoopSampler(LoopTraining(**spec), LOOPED, seed)
    return [sampler.loops(step, 0.5) for step in range(count)]


@pytest.mark.parametrize(
    "spec",
    [
        {"sampling": "uniform", "min": 2, "max": 5},
        {"sampling": "poisson", "mean": 3.0, "min": 2, "max": 5},
        {"sampling": "poisson", "mean": 1.0},
        {"curriculum": ((0.0, 1), (0.25, 3), (0.5, 1))},
        {},
    ],
)
def test_shares_of_loop_counts_are_those_that_are_drawn(spec):
    sampler, steps = LoopSampler(LoopTraining(**spec), LOOPED, 0), 2000
    drawn = Counter(sampler.loops(step, step / steps) or 7 for step in range(steps))
    shares = LoopTraining(**spec).shares(7)
    assert sum(shares.values()) == pytest.approx(1.0) and drawn.keys() == {
        n for n, share in shares.items() if share > 0
    }
    for count, share in shares.items():
        assert drawn[count] / steps == pytest.approx(share, abs=0.035)


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


def ids(rows: int = 8, length: int = 50, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def test_off_is_the_input_itself():
    given = ids()
    assert Corruption(0.0, 11, SPECIAL, 0)(given, 3, 0) is given


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
def test_how_many_are_replaced_and_by_what(probability):
    """Of 200,000 tokens; a token drawn in its own place shows as kept, with chance 1 in 9."""
    given = torch.full((100, 2000), 3)
    found = Corruption(probability, 11, SPECIAL, 7)(given, 0, 0)
    assert torch.equal(given, torch.full((100, 2000), 3)) and found.dtype == given.dtype
    shares = torch.bincount(found.flatten(), minlength=11).double() / found.numel()
    each = probability / TEXT
    assert shares[EOS] == shares[UNKNOWN] == 0 and shares[3].item() == pytest.approx(1 - 8 * each, abs=0.006)
    others = [share.item() for token, share in enumerate(shares) if token not in (3, *SPECIAL)]
    assert others == pytest.approx([each] * 8, abs=0.006)


def test_special_tokens_are_never_replaced():
    given = ids()
    found = Corruption(0.99, 11, SPECIAL, 0)(given, 0, 0)
    for token in SPECIAL:
        assert torch.equal(given == token, found == token) and (given == token).any()
    assert (given != found).float().mean() > 0.6


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 4))
def test_draws_depend_on_seed_step_and_row_alone(seed, step, first, parts):
    given = ids()
    whole = Corruption(0.5, 11, SPECIAL, seed)(given, step, first)
    assert torch.equal(Corruption(0.5, 11, SPECIAL, seed)(given, step, first), whole)
    size = -(-8 // parts)
    pieces = [
        Corruption(0.5, 11, SPECIAL, seed)(given[at : at + size], step, first + at) for at in range(0, len(given), size)
    ]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": -1}, {"step": 1}, {"first": 1}])
def test_each_of_them_changes_the_draws(change):
    at = {"seed": 0, "step": 0, "first": 0}

    def drawn(seed: int, step: int, first: int) -> torch.Tensor:
        return Corruption(0.5, 11, SPECIAL, seed)(ids(), step, first)

    assert not torch.equal(drawn(**at), drawn(**(at | change)))


def test_global_random_numbers_are_not_used():
    torch.manual_seed(0), np.random.seed(0)
    first = Corruption(0.5, 11, SPECIAL, 0)(ids(), 0, 0)
    state = torch.random.get_rng_state()
    assert torch.equal(Corruption(0.5, 11, SPECIAL, 0)(ids(), 0, 0), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_numbers_are_not_those_of_the_loop_counts():
    """Both are keyed by seed and step; were they one stream, a deep step would be one with corrupted beginnings."""
    schedule, spec = parse("(1)x2"), LoopTraining(sampling="uniform", min=1, max=2)
    sampler, corruption = LoopSampler(spec, schedule, 0), Corruption(0.5, 1000, [999], 0)
    given = torch.zeros(1, 1, dtype=torch.long)
    pairs = [(sampler.loops(step, 0.0), int(corruption(given, step, 0))) for step in range(400)]
    deep = np.array([loops == 2 for loops, _ in pairs])
    changed = np.array([token != 0 for _, token in pairs])
    assert abs(np.corrcoef(deep, changed)[0, 1]) < 0.2
