"""Precision and compilation: what is asked for, what is measured, and the way back when a compiler fails."""

import shutil

import pytest
import torch
from torch import nn

from ouroboros.config import TrainSpec
from ouroboros.train import precision
from ouroboros.train.precision import (
    Choices,
    autocast,
    choose_dtype,
    choose_threads,
    compile_blocks,
    matmul_peak,
    using_threads,
)

CPU = torch.device("cpu")


def blocks() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def is_compiled(modules: nn.ModuleList) -> list[bool]:
    return [module._compiled_call_impl is not None for module in modules]


def test_precision_is_as_asked():
    assert choose_dtype(TrainSpec(precision="fp32"), CPU) == torch.float32
    assert choose_dtype(TrainSpec(precision="bf16"), CPU) == torch.bfloat16


@pytest.mark.parametrize(("ratio", "chosen"), [(1.4, torch.float32), (1.6, torch.bfloat16)])
def test_auto_takes_the_measured_faster_one(ratio, chosen, monkeypatch):
    monkeypatch.setattr(precision, "matmul_peak", lambda device, dtype, *_: ratio if dtype == torch.bfloat16 else 1.0)
    assert choose_dtype(TrainSpec(), CPU) == chosen


def test_auto_measures_on_this_machine():
    assert choose_dtype(TrainSpec(precision="auto"), CPU) in (torch.float32, torch.bfloat16)
    measured = matmul_peak.cache_info().misses
    choose_dtype(TrainSpec(precision="auto"), CPU)
    assert matmul_peak.cache_info().misses == measured  # by the first line, not again
    assert 1e8 < matmul_peak("cpu", torch.float32) < 1e14


def test_autocast_is_on_for_bfloat16_alone():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert layer(x).dtype == torch.float32 and torch.equal(layer(x), nn.functional.linear(x, *layer.parameters()))


@pytest.mark.parametrize(
    ("choice", "seconds", "dtype", "compiler", "line", "warned"),
    [
        ("off", None, torch.float32, True, "compile: off", False),
        ("on", 1.0, torch.float32, True, "compile: per block", False),
        ("auto", 1000.0, torch.float32, True, "compile: per block", False),
        ("auto", None, torch.float32, True, "compile: per block", False),
        ("auto", 10.0, torch.float32, True, "compile: off (the run is too short for it to pay)", False),
        ("auto", 300.0, torch.float32, True, "compile: off (the run is too short for it to pay)", False),
        ("auto", 300.0, torch.bfloat16, True, "compile: per block", False),  # there it saves half of a step
        ("auto", 1000.0, torch.float32, False, "compile: off (no C++ compiler on this machine)", False),
        ("on", 1000.0, torch.float32, False, "compile: off (no C++ compiler on this machine)", True),
    ],
)
def test_compilation_is_chosen_and_said(choice, seconds, dtype, compiler, line, warned, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if compiler else None)
    modules = blocks()
    assert compile_blocks(modules, TrainSpec(compile=choice), CPU, seconds, dtype) == line
    assert is_compiled(modules) == [line == "compile: per block"] * 2
    assert ("no C++ compiler on this machine; training runs uncompiled" in caplog.text) == warned


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
    monkeypatch.setattr("ouroboros.train.precision.time.perf_counter", clock)
    torch.set_num_threads(6)
    try:
        assert choose_threads(clock.step) == chosen
        assert torch.get_num_threads() == 6 and len(clock.steps) == steps
    finally:
        torch.set_num_threads(before)


def test_one_thread_leaves_nothing_to_choose():
    assert choose_threads(lambda: pytest.fail("nothing is measured"), 1) == 1


def test_choices_go_through_json_and_old_checkpoints_mean_what_was_done_then():
    choices = Choices(dtype=torch.float32, muon_dtype=torch.float32, threads=3, compile="off")
    assert Choices.from_dict(choices.to_dict()) == choices
    old = Choices.from_dict({"dtype": "float32"})
    assert old.muon_dtype == torch.bfloat16 and old.threads == torch.get_num_threads() and old.compile is None


def test_threads_are_those_asked_for_within_the_context_alone():
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_processor_without_bfloat16_units_is_not_made_to_do_a_large_product(monkeypatch):
    sizes = []

    def peak(device, dtype, seconds=0.3, size=None):
        sizes.append(size)
        return 1.0 if dtype == torch.bfloat16 else 80.0

    monkeypatch.setattr(precision, "matmul_peak", peak)
    assert choose_dtype(TrainSpec(), CPU) == torch.float32 and sizes == [256, 256]
