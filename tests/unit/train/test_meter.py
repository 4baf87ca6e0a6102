"""Rates and shares, from numbers that are known."""

import math
from types import SimpleNamespace

import pytest

from ouroboros.config import OptimSpec, TrainSpec
from ouroboros.train.distributed import Workers
from ouroboros.train.loop import Counters, StepResult
from ouroboros.train.meter import Meter
from ouroboros.train.stop import Budget


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
        budget=Budget(steps=20),
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
