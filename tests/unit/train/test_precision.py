"""Precision and compilation: what is asked for, what is measured, and the way back when a compiler fails."""

import shutil

import pytest
import torch
from torch import nn

from ouroboros.config import TrainSpec
from ouroboros.train import precision
from ouroboros.train.precision import autocast, choose_dtype, compile_blocks, matmul_peak

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
    monkeypatch.setattr(precision, "matmul_peak", lambda device, dtype: ratio if dtype == torch.bfloat16 else 1.0)
    assert choose_dtype(TrainSpec(), CPU) == chosen


def test_auto_measures_on_this_machine():
    assert choose_dtype(TrainSpec(precision="auto"), CPU) in (torch.float32, torch.bfloat16)
    measured = matmul_peak.cache_info().misses
    assert 1e8 < matmul_peak("cpu", torch.float32) < 1e14
    assert matmul_peak.cache_info().misses == measured  # by the first line, not again


def test_autocast_is_on_for_bfloat16_alone():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert layer(x).dtype == torch.float32 and torch.equal(layer(x), nn.functional.linear(x, *layer.parameters()))


@pytest.mark.parametrize(
    ("choice", "seconds", "compiler", "line", "warned"),
    [
        ("off", None, True, "compile: off", False),
        ("on", 1.0, True, "compile: per block", False),
        ("auto", 1000.0, True, "compile: per block", False),
        ("auto", None, True, "compile: per block", False),
        ("auto", 10.0, True, "compile: off (the run is too short for it to pay)", False),
        ("auto", 1000.0, False, "compile: off (no C++ compiler on this machine)", False),
        ("on", 1000.0, False, "compile: off (no C++ compiler on this machine)", True),
    ],
)
def test_compilation_is_chosen_and_said(choice, seconds, compiler, line, warned, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if compiler else None)
    modules = blocks()
    assert compile_blocks(modules, TrainSpec(compile=choice), CPU, seconds) == line
    assert is_compiled(modules) == [line == "compile: per block"] * 2
    assert ("no C++ compiler on this machine; training runs uncompiled" in caplog.text) == warned
