"""Rates and shares, from numbers that are known."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from ouroboros.config import OptimSpec, TrainSpec
from ouroboros.train.distributed import Workers
from ouroboros.train.meter import Meter
from ouroboros.train.stop import Counters
from ouroboros.train.trainer import StepResult


@pytest.fixture
def trainer():
    """What a meter reads of a trainer; the test's peak is 1e9 operations per second and process."""
    recipe = SimpleNamespace(optim=OptimSpec(lr=0.02), train=TrainSpec(steps=20))
    return SimpleNamespace(
        recipe=recipe,
        counters=Counters(step=5, tokens=1000, seconds=10.0),
        device=SimpleNamespace(type="cpu"),
        dtype="float32",
        workers=Workers(0, 2),
        bytes_per_token=4.0,
        flops_per_token=10_000,
        visits=lambda loops: 2 + (3 if loops is None else loops),
        choices=SimpleNamespace(threads=2, threads_now=None),
    )


RESULT = StepResult(loss=2.0, grad_norm=0.5, lr_factor=0.25, beta=0.9, loops=3, skipped=False, telemetry=None)


def test_a_record_has_the_rates_since_the_last(trainer):
    meter = Meter(trainer)  # a resumed run's earlier time does not count
    trainer.counters = Counters(step=10, tokens=21_000, seconds=12.0, skipped=1)
    record = meter.record(RESULT)
    assert record["tokens_per_second"] == pytest.approx(10_000)
    assert record["peak_share"] == pytest.approx(10_000 * 10_000 / 2e9)
    assert record["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 4.0)
    assert (record["lr"], record["loops"], record["skipped"], record["step"]) == (0.005, 3, 1, 10)
    trainer.counters = Counters(step=11, tokens=22_000, seconds=13.0)
    assert meter.record(RESULT)["tokens_per_second"] == pytest.approx(1000)


def test_a_cycled_coefficient_is_recorded(trainer):
    assert "beta1" not in Meter(trainer).record(RESULT)
    trainer.recipe.optim = OptimSpec(schedule="one_cycle", momentum_cycle=(0.85, 0.95))
    assert Meter(trainer).record(RESULT)["beta1"] == 0.9


def test_the_status_shows_progress_and_skipped_steps(trainer):
    meter = Meter(trainer)
    trainer.counters = Counters(step=10, tokens=21_000, seconds=12.0)
    status = meter.status(RESULT)
    assert (status.progress, status.note, status.loss) == (0.5, "", 2.0)
    assert status.tokens_per_second == pytest.approx(10_000) == meter.status(RESULT).tokens_per_second
    trainer.counters.skipped = 2
    assert meter.status(RESULT).note == "2 steps skipped"


def test_no_time_is_no_division_by_zero(trainer):
    assert Meter(trainer).rate == 0.0


def steps(meter, seconds, count=5, loops=None):
    """What is said of ``count`` equal steps."""
    result = dataclasses.replace(RESULT, seconds=seconds, loops=loops)
    return [line for line in (meter.slowed(result) for _ in range(count)) if line is not None]


def test_a_fall_of_the_throughput_is_said_once_until_it_recovers(trainer):
    meter = Meter(trainer)
    assert steps(meter, 2.0) == [] and steps(meter, 1.0) == []  # the best so far is one step a second
    assert steps(meter, 1.9) == []
    (line,) = steps(meter, 2.5, count=20)
    assert line.startswith("other programs use the processor: training runs at 40% of its best speed")
    assert "of 2 processors" in line
    assert steps(meter, 1.5) == [] and steps(meter, 2.5) == []  # between half and recovered nothing is said
    assert steps(meter, 1.1) == [] and len(steps(meter, 2.5)) == 1


def test_a_few_steps_or_seconds_say_nothing_about_the_throughput(trainer):
    meter = Meter(trainer)
    assert steps(meter, 1.0, count=5) == []
    assert steps(meter, 0.1, count=49) == []
    assert steps(meter, 60.0, count=4) == []


def test_more_loops_are_more_work_and_not_a_slower_machine(trainer):
    meter = Meter(trainer)
    assert steps(meter, 1.0, loops=1) == []  # three visits
    assert steps(meter, 6.0, loops=16) == []  # eighteen
    assert len(steps(meter, 18.0, loops=16)) == 1
