"""Threads are chosen by measurement, and fewer compute while other programs use the processor."""

import pytest
import torch

from ouroboros.train.threads import Threads, choose_threads, using_threads


class Clock:
    """Stands for ``time.perf_counter``; a step takes what ``seconds`` says for the threads of the moment."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.steps = seconds, 0.0, []

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.steps.append(torch.get_num_threads())
        self.now += self.seconds[torch.get_num_threads()]


@pytest.mark.parametrize(
    ("seconds", "chosen", "steps"),
    [
        ({1: 0.1, 2: 0.06, 4: 0.04, 6: 0.035}, 6, 9),  # one and two threads are out after the first turn
        ({1: 0.1, 2: 0.2, 4: 0.3, 6: 0.4}, 1, 5),  # the smallest is decided at once
        ({1: 0.100, 2: 0.099, 4: 0.098, 6: 0.099}, 1, 13),  # within 3 %: fewer leave the rest to others
        ({1: 9.0, 2: 5.0, 4: 3.0, 6: 2.5}, 6, 2),  # too long to be repeated
    ],
)
def test_threads_are_chosen_by_measurement(seconds, chosen, steps, monkeypatch):
    clock, before = Clock(seconds), torch.get_num_threads()
    monkeypatch.setattr("ouroboros.train.threads.perf_counter", clock)
    torch.set_num_threads(6)
    try:
        assert choose_threads(clock.step) == chosen
        assert torch.get_num_threads() == 6 and len(clock.steps) == steps
    finally:
        torch.set_num_threads(before)


def test_one_thread_leaves_nothing_to_choose():
    with using_threads(1):
        assert choose_threads(lambda: pytest.fail("nothing is measured")) == 1


def test_threads_are_those_asked_for_within_the_context_alone():
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


class Machine:
    """Work per second by number of threads; ``busy`` is what is left of it beside another program."""

    rate = {1: 0.55, 2: 1.0, 4: 1.8}
    busy = {1: 0.55, 2: 0.3, 4: 0.2}

    def __init__(self, threads: Threads) -> None:
        self.threads, self.changes, self.clock, self.done = threads, [], 0.0, 0.0

    def run(self, seconds: float, *, busy: bool = False) -> float:
        """Take steps for ``seconds``; the work done per second."""
        until, before, begun = self.clock + seconds, self.done, self.clock
        while self.clock < until:
            took = 0.5 / (self.busy if busy else self.rate)[self.threads.now]
            self.clock, self.done = self.clock + took, self.done + 0.5
            count = self.threads.observe(took, 0.5)
            if count is not None:
                assert count == self.threads.now
                self.changes.append(count)
        return (self.done - before) / (self.clock - begun)


def test_an_idle_machine_changes_nothing():
    machine = Machine(Threads(2))
    assert machine.run(600) == pytest.approx(1.0) and machine.changes == []


@pytest.mark.parametrize(("chosen", "kept"), [(2, 1), (4, 2)])
def test_fewer_threads_compute_beside_a_busy_program_if_they_are_faster(chosen, kept):
    machine = Machine(Threads(chosen))
    machine.run(60)
    machine.run(20, busy=True)
    assert machine.changes == [kept]


def test_at_least_half_the_idle_speed_is_kept_and_all_comes_back_afterwards():
    machine = Machine(Threads(2))
    machine.run(60)
    assert machine.run(600, busy=True) > 0.5
    machine.run(500)
    assert machine.threads.now == 2 and machine.run(600) == pytest.approx(1.0)


def test_attempts_that_fail_become_rare():
    machine = Machine(Threads(2))
    machine.busy = {1: 0.1, 2: 0.3}  # one thread is no better
    machine.run(60)
    assert machine.run(3000, busy=True) > 0.28
    assert machine.threads.now == 2 and len(machine.changes) < 20


def test_one_thread_is_left_alone():
    threads = Threads(1)
    assert all(threads.observe(seconds, 1.0) is None for seconds in [1.0] * 20 + [9.0] * 20)


def test_a_resumed_run_goes_on_with_what_it_had_and_tries_all_again():
    machine = Machine(Threads(2, 1))
    machine.run(60)
    assert machine.changes == [2]
