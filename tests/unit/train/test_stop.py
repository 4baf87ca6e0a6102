"""Budgets, and what signals do."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ouroboros
from ouroboros.config import TrainSpec
from ouroboros.errors import OuroborosError
from ouroboros.train.stop import Counters, StopControl, check_budget, early_stop, share_done


@pytest.mark.parametrize(
    ("spec", "half", "whole"),
    [
        (TrainSpec(steps=10), (5, 0, 0), (10, 0, 0)),
        (TrainSpec(tokens=1000), (99, 500, 0), (0, 1000, 0)),
        (TrainSpec(minutes=0.5), (99, 10**9, 15.0), (0, 0, 30.0)),
    ],
)
def test_a_budget_counts_only_its_own_unit(spec, half, whole):
    assert share_done(spec, 0, 0, 0.0) == 0.0 and share_done(spec, *half) == 0.5
    assert share_done(spec, *whole) == share_done(spec, *(3 * x for x in whole)) == 1.0


@given(st.integers(1, 10**6))
def test_a_budget_of_steps_ends_exactly_at_its_last_step(steps):
    spec = TrainSpec(steps=steps)
    assert share_done(spec, steps, 0, 0) == 1 and share_done(spec, steps - 1, 0, 0) < 1
    assert 0 < share_done(spec, 0.5, 0, 0) < 1 and share_done(spec, steps - 0.5, 0, 0) < 1


def test_a_run_needs_exactly_one_positive_budget():
    check_budget(TrainSpec(tokens=5))
    with pytest.raises(OuroborosError, match=r"exactly one of --steps, --tokens and --minutes$"):
        check_budget(TrainSpec())
    with pytest.raises(OuroborosError, match="not steps and minutes"):
        TrainSpec(steps=1, minutes=1.0)
    with pytest.raises(OuroborosError, match=r"train\.steps must be > 0"):
        TrainSpec(steps=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_once_and_handlers_come_back(number):
    messages: list[str] = []
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopControl(messages.append) as control:
        assert not control.requested
        os.kill(os.getpid(), number)
        assert control.requested and control.reason == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(messages) == 1 and "saving a checkpoint" in messages[0]
    assert ("interrupt again" in messages[0]) == (number == signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopControl(print):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_message_that_fails_to_print_does_not_end_the_run():
    def tell(message: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with StopControl(tell) as control:
        os.kill(os.getpid(), signal.SIGINT)
    assert control.requested


def test_other_threads_install_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopControl(print) as control:
            seen.append((signal.getsignal(signal.SIGINT), control.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


TWICE = """
import os, signal
from ouroboros.train.stop import StopControl
with StopControl(lambda line: None):
    os.kill(os.getpid(), signal.SIGINT)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("second", flush=True)
"""


def test_the_second_interrupt_ends_at_once():
    source = str(Path(ouroboros.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", TWICE], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "first\n")


GOOD = {"valid_nats_per_token": 2.0, "valid_nats_stderr": 0.05, "valid_bits_per_byte": 0.9}


@pytest.mark.parametrize(
    ("target", "changes", "stops"),
    [
        (2.1, {}, True),
        (2.0999, {}, False),
        (None, {}, False),
        (2.1, {"valid_nats_stderr": None}, False),
        (2.1, {"valid_nats_stderr": 0.06}, False),
        (9.9, dict.fromkeys(GOOD), False),
    ],
)
def test_a_target_is_reached_with_two_standard_errors(target, changes, stops):
    found = early_stop(TrainSpec(target_loss=target), Counters(**{**GOOD, **changes}))
    assert (found is not None) == stops
    if found is not None:
        assert found.reason == "target_loss" and "2.0000 nats per token (0.9000 bits per byte)" in found.message


def test_patience_counts_validations_without_a_best():
    spec = TrainSpec(patience=3)
    best = {"best_step": 40, "best_bits_per_byte": 1.25}
    assert early_stop(spec, Counters(**best, validations_without_best=2)) is None
    found = early_stop(spec, Counters(**best, validations_without_best=3))
    assert found is not None and found.reason == "patience" and "1.2500 bits per byte at step 40" in found.message
    assert early_stop(spec, Counters(validations_without_best=3)) is None  # there is nothing to go back to
    assert early_stop(TrainSpec(), Counters(**best, validations_without_best=99)) is None
