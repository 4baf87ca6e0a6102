"""What fits in the demo's time, from numbers that are known."""

from __future__ import annotations

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.demo import plan
from ouroboros.demo.plan import (
    CURVE,
    PRESETS,
    arms_of,
    beginnings,
    looped_minutes,
    make_plan,
    relative_costs,
    scored_part,
)
from ouroboros.recipes import recipe


@pytest.fixture
def machine(monkeypatch):
    """``machine(rate)``: one that trains ``rate`` tokens a second of size small, without a compiler."""

    def set_rate(rate, speed_up=1.0):
        monkeypatch.setattr(plan, "training_rate", lambda recipe: rate)
        monkeypatch.setattr(plan, "speed_up", lambda recipe, seconds: speed_up)

    return set_rate


def test_more_time_and_a_faster_machine_bring_larger_models(machine):
    order = [(size, batch) for _, size, _, batch in PRESETS]
    found = []
    for minutes, rate in ((60, 20_000), (10, 5000), (2, 5000), (0.5, 2000)):
        machine(rate)
        made = make_plan(minutes, None, None)
        found.append(order.index((made.size, made.batch)))
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(PRESETS) - 1


def test_what_the_user_gives_is_kept(machine):
    machine(5000)
    made = make_plan(10, "base", "bytes")
    assert (made.size, made.tokenizer) == ("base", "bytes") and "base, bytes" in made.describe()


def test_the_rate_is_measured_and_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert plan.training_rate(recipe("loop", "tiny")) > 10
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("rate", [1000.0, 5000.0, 50_000.0])
@pytest.mark.parametrize("seconds", [100.0, 600.0, 3600.0])
@pytest.mark.parametrize("faster", [(1.3, 1.2), (3.0, 2.5)])
def test_all_trainings_and_what_follows_fit_the_time(rate, seconds, faster, machine):
    machine(rate)
    chosen, rates = recipe("loop", "small"), [rate, *(rate * each for each in faster)]
    test = scored_part([b"x" * 30_000] * 20, seconds, rate)
    minutes = looped_minutes(chosen, seconds, rates, 7_000_000)
    passes = (3 + 4 * CURVE) * 2 * sum(map(len, test)) / 3  # tokens of all forward passes, each a third of a step
    assert passes / (3 * rate) <= plan.SCORING * seconds * 1.01
    trained = 60 * minutes * sum(rate / each for each in rates)  # equally many tokens of each model
    assert plan.LEAST * seconds * 0.99 <= trained < seconds * (1 - plan.SCORING)
    assert looped_minutes(chosen, 2 * seconds, rates, 7_000_000) > minutes


def test_the_looped_model_and_two_twins_of_equal_size():
    looped, plain, deep = arms_of(recipe("loop", "small"), 10)
    sizes = [cost(arm.model).parameters for arm in (looped, plain, deep)]
    assert max(sizes) / min(sizes) < 1.01 and deep.model.hidden_size < plain.model.hidden_size
    assert [arm.name for arm in (looped, plain, deep)] == ["loop", "loop-twin", "loop-deep"]
    costs = relative_costs(looped, 10)
    assert costs[0] == 1 and max(costs[1:]) < 1
    assert arms_of(looped, 2) == [looped, plain] and relative_costs(looped, 2) == costs[:2]


def test_compiling_is_taken_from_the_time(machine):
    chosen = recipe("loop", "small")
    machine(5000)
    without = looped_minutes(chosen, 600, [5000] * 3, 1000)
    machine(5000, speed_up=2.0)
    assert without > looped_minutes(chosen, 600, [5000] * 3, 1000)


def test_long_documents_are_cut_alike_and_short_ones_kept():
    documents = [b"a" * 10, b"b" * 100, b"c" * 1000, b"d" * 5000]
    assert beginnings(documents, 10_000) == documents
    assert [len(part) for part in beginnings(documents, 610)] == [10, 100, 250, 250]
    assert [len(part) for part in beginnings(documents, 1)] == [10, 64, 64, 64]
    assert beginnings(["é".encode() * 100], 65) == ["é".encode() * 32]  # never inside a character
