"""Precision and compilation: what is asked for, what is measured, and the way back when a compiler fails."""

import shutil

import pytest
import torch
from torch import nn

from ouroboros.config import TrainSpec
from ouroboros.train import precision
from ouroboros.train.precision import (
    Choices,
    choose_dtype,
    compile_blocks,
    matmul_peak,
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


@pytest.mark.parametrize(
    ("choice", "seconds", "dtype", "compiler", "line", "warned"),
    [
        ("off", 1.0, torch.float32, True, "compile: off", False),
        ("on", 1.0, torch.float32, True, "compile: per block", False),
        ("auto", 1000.0, torch.float32, True, "compile: per block", False),
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


def test_choices_go_through_json_and_old_checkpoints_mean_what_was_done_then():
    choices = Choices(dtype=torch.float32, muon_dtype=torch.float32, threads=3, compile="off")
    assert Choices.from_dict(choices.to_dict()) == choices
    old = Choices.from_dict({"dtype": "float32"})
    assert old.muon_dtype == torch.bfloat16 and old.threads == torch.get_num_threads() and old.compile is None


def test_a_processor_without_bfloat16_units_is_not_made_to_do_a_large_product(monkeypatch):
    sizes = []

    def peak(device, dtype, seconds=0.3, size=None):
        sizes.append(size)
        return 1.0 if dtype == torch.bfloat16 else 80.0

    monkeypatch.setattr(precision, "matmul_peak", peak)
    assert choose_dtype(TrainSpec(), CPU) == torch.float32 and sizes == [256, 256]
