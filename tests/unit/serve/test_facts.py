"""What a server tells of its model, and the memory that it asks for before it reads one."""

import dataclasses
from pathlib import Path

import pytest

from ouroboros.accounting import cost
from ouroboros.config import LoopTraining
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.serve import facts
from ouroboros.serve.facts import available_memory, check_memory, loop_costs, most_loops, segments, trained_loops

LOOP = recipe("loop", "tiny")
PLAIN = recipe("gpt", "tiny")


def trained_with(**loops):
    train = dataclasses.replace(LOOP.train, loops=LoopTraining(**loops))
    return trained_loops(LOOP.model, dataclasses.replace(LOOP, train=train))


def test_trained_loops():
    usual = LOOP.model.schedule.loops
    assert trained_loops(LOOP.model, None) == trained_with(sampling="fixed") == (usual, usual)
    assert trained_with(sampling="uniform", min=2, max=6) == (2, 6)
    assert trained_with(sampling="poisson", max=5) == (1, 5)
    assert trained_with(curriculum=((0.0, 1), (0.5, 3))) == (1, 3)
    assert trained_loops(PLAIN.model, PLAIN) == (1, 1)


def test_most_loops():
    usual = LOOP.model.schedule.loops
    assert most_loops(LOOP.model, (2, 6), None) == 24 and most_loops(LOOP.model, (1, 1), None) == 4 * usual
    assert most_loops(LOOP.model, (2, 6), 9) == 9 and most_loops(PLAIN.model, (1, 1), None) == 1
    with pytest.raises(OuroborosError, match=f"--max-loops must be at least the model's {usual}, got 1"):
        most_loops(LOOP.model, (2, 6), 1)


def test_costs_and_segments():
    costs = loop_costs(LOOP.model, 3, 100)
    assert [c["loops"] for c in costs] == [1, 2, 3]
    assert costs[2]["flops_per_token"] == cost(LOOP.model, context=100, loops=3).flops_per_token
    assert costs[0]["cache_bytes_per_token"] < costs[1]["cache_bytes_per_token"]
    assert len(loop_costs(PLAIN.model, 1, 100)) == 1
    assert [s["looped"] for s in segments(LOOP.model.schedule)] == [False, True, False]


def test_memory_is_estimated_and_refused_in_words():
    sizes = {"rows": 4, "context": 100, "loops": 3}
    total = cost(LOOP.model, context=100, loops=3)
    needs = total.parameters * 4 + 4 * (100 * total.cache_bytes_per_token() + total.state_bytes())
    assert check_memory(LOOP.model, **sizes, available=needs) == needs
    with pytest.raises(OuroborosError, match=r"needs about .* for 4 answers of 100 tokens at 3 loops.*lower --batch"):
        check_memory(LOOP.model, **sizes, available=needs - 1)


def test_available_memory_is_asked_of_the_system(monkeypatch):
    assert available_memory() is None or available_memory() > 0
    texts = {"meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n", "memory.max": "max\n", "memory.current": "1\n"}
    monkeypatch.setattr(facts, "Path", lambda *parts: Fake(texts, ""))
    assert available_memory() == 8192
    texts["memory.max"] = "5001"
    assert available_memory() == 5000


class Fake:
    """A path to made-up files."""

    def __init__(self, texts, name):
        self.texts, self.name = texts, name

    def __truediv__(self, name):
        return Fake(self.texts, name)

    def read_text(self):
        return self.texts[Path(self.name or "meminfo").name]
