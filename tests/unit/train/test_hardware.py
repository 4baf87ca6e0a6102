"""Which preset fits which machine, and what is said about it."""

from types import SimpleNamespace

import pytest
import torch

from ouroboros.train import hardware
from ouroboros.train.hardware import choose_size

PRESETS = (("beast", 12.0), ("pro", 6.0), ("lite", 0.0))


@pytest.fixture
def machine(monkeypatch):
    """``machine(*gb)``: one with CUDA devices of these sizes; ``threads`` and ``memory`` are the processor's."""

    def use(*gb, threads=8, memory=64.0):
        devices = [SimpleNamespace(name=f"T{index}", total_memory=size * 1e9) for index, size in enumerate(gb)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(hardware, "memory_gb", lambda: memory)

    return use


@pytest.mark.parametrize(
    ("gb", "size", "reason"),
    [
        ((80.0,), "beast", "CUDA device T0 with 80.0 GB; needs 12"),
        ((12.0,), "beast", "CUDA device T0 with 12.0 GB; needs 12"),
        ((11.9,), "pro", "CUDA device T0 with 11.9 GB; needs 6; beast needs 12"),
        ((4.0,), "lite", "CUDA device T0 with 4.0 GB; pro needs 6"),
        ((24.0, 8.0), "pro", "CUDA device T1 with 8.0 GB; needs 6; beast needs 12"),  # the smallest counts
    ],
)
def test_the_largest_preset_that_fits(gb, size, reason, machine):
    machine(*gb)
    assert choose_size(PRESETS) == (size, reason)


def test_without_a_device_the_last_preset_is_taken(machine):
    machine(threads=2, memory=24.4)
    assert choose_size(PRESETS) == ("lite", "no CUDA device; 2 CPU threads, 24 GB of memory")
    machine(threads=1, memory=None)
    assert choose_size(PRESETS) == ("lite", "no CUDA device; 1 CPU thread")


def test_a_device_too_small_for_every_preset_gets_the_last(machine):
    machine(1.0)
    assert choose_size((("big", 9.0), ("less", 5.0)))[0] == "less"


def test_this_machine(monkeypatch):
    memory = hardware.memory_gb()
    assert memory is not None and 0.1 < memory < 1e5
    assert choose_size(PRESETS)[0] in dict(PRESETS)
    monkeypatch.delattr(hardware.os, "sysconf")
    assert hardware.memory_gb() is None
