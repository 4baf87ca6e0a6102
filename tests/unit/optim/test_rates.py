"""Schedules."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ouroboros.config import OptimSpec
from ouroboros.optim import (
    first_beta,
    learning_rate,
)

specs = st.builds(
    OptimSpec,
    schedule=st.sampled_from(["wsd", "cosine", "constant", "one_cycle"]),
    warmup_fraction=st.floats(0, 0.5),
    decay_fraction=st.floats(0, 0.5),
    final_lr=st.floats(0, 1),
)


@given(specs, st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))
def test_schedules_stay_in_range_rise_then_fall(spec, p, q):
    low, high = sorted((p, q))
    a, b = learning_rate(low, spec), learning_rate(high, spec)
    assert 0 <= a <= 1 and 0 <= b <= 1
    if high < spec.warmup_fraction:
        assert a <= b
    if low >= spec.warmup_fraction:
        assert a >= b - 1e-12


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("wsd", {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.6: 1.0, 0.8: 0.55, 1.0: 0.1, 2.0: 0.1}),
        ("cosine", {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.4: 0.55 + 0.45 * math.sqrt(0.5), 0.6: 0.55, 1.0: 0.1, 2.0: 0.1}),
        ("constant", {-1.0: 0.0, 0.1: 0.5, 0.2: 1.0, 1.0: 1.0}),
    ],
)
def test_schedule_values(schedule, expected):
    spec = OptimSpec(schedule=schedule, warmup_fraction=0.2, decay_fraction=0.4, final_lr=0.1)
    assert {progress: learning_rate(progress, spec) for progress in expected} == pytest.approx(expected)


@given(
    steps=st.integers(2, 60),
    warmup=st.floats(0, 1),
    start=st.floats(2, 50),
    end=st.floats(2, 1e5),
    low=st.floats(0, 0.9),
)
def test_one_cycle_is_that_of_torch(steps, warmup, start, end, low):
    assume(abs(warmup * steps - 1) > 1e-6 and warmup < 1 - 1e-6)  # torch divides by zero there
    high = low + 0.09
    spec = OptimSpec(
        schedule="one_cycle",
        warmup_fraction=warmup,
        decay_fraction=0.0,
        start_lr=1 / start,
        final_lr=1 / start / end,
        momentum_cycle=(low, high),
    )
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        steps,
        pct_start=warmup,
        div_factor=start,
        final_div_factor=end,
        base_momentum=low,
        max_momentum=high,
    )
    for step in range(steps):
        group = optimizer.param_groups[0]
        middle = (step + 0.5) / steps
        assert learning_rate(middle, spec, steps) == pytest.approx(group["lr"], abs=1e-12)
        assert first_beta(middle, spec, steps) == pytest.approx(group["betas"][0], abs=1e-12)
        if step + 1 < steps:
            optimizer.step()
            scheduler.step()


def test_one_cycle_of_many_steps_or_of_few():
    spec = OptimSpec(schedule="one_cycle", warmup_fraction=0.25, start_lr=0.1, final_lr=0.2, momentum_cycle=(0.8, 0.9))
    found = {progress: learning_rate(progress, spec) for progress in (-1.0, 0.0, 0.125, 0.25, 0.625, 1.0, 2.0)}
    assert list(found.values()) == pytest.approx([0.1, 0.1, 0.55, 1.0, 0.6, 0.2, 0.2])
    assert learning_rate(0.3, spec, 10**9) == pytest.approx(learning_rate(0.3, spec), abs=1e-8)
    assert first_beta(0.0, spec) == 0.9 and first_beta(0.25, spec) == pytest.approx(0.8)
    assert learning_rate(0.5, spec, 1) == 0.2  # one step is the last
    rise = dataclasses.replace(spec, warmup_fraction=1.0, decay_fraction=0.0)
    for steps in (1, 3, 7, 49):
        assert learning_rate((steps - 0.5) / steps, rise, steps) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 7, math.inf])
def test_other_schedules_do_not_ask_for_the_steps_and_leave_momentum_alone(schedule, steps):
    spec = OptimSpec(schedule=schedule, betas=(0.7, 0.9))
    for index in range(21):
        assert learning_rate(index / 20, spec, steps) == learning_rate(index / 20, spec)
        assert first_beta(index / 20, spec, steps) == 0.7


@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1), st.floats(0, 0.5))
def test_a_decay_counted_in_steps_is_that_of_their_share(steps, decay, final, warmup):
    share = decay / steps
    assume(warmup + share <= 1)
    counted = OptimSpec(decay_steps=decay, final_lr=final, warmup_fraction=warmup)
    shared = OptimSpec(decay_fraction=share, final_lr=final, warmup_fraction=warmup)
    for step in range(steps):
        here = (step + 0.5) / steps
        assert learning_rate(here, counted, steps) == pytest.approx(learning_rate(here, shared))


def test_a_decay_longer_than_the_run_begins_at_once_and_meets_the_warm_up():
    spec = OptimSpec(decay_steps=200, warmup_fraction=0.1)
    found = [learning_rate(progress, spec, 100) for progress in (0.0, 0.05, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.475, 0.4, 0.2, 0.0])
    assert learning_rate(0.3, spec) == 1.0  # no step taken yet: the run seems endless


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_schedules_without_warmup_or_decay(schedule):
    spec = OptimSpec(schedule=schedule, warmup_fraction=0.0, decay_fraction=0.0)
    assert learning_rate(0.0, spec) == 1.0
    whole = OptimSpec(schedule=schedule, warmup_fraction=1.0, decay_fraction=0.0)
    assert learning_rate(0.5, whole) == 0.5
