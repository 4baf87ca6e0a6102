"""Which preset fits which machine, and what is said about it."""

from types import SimpleNamespace

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.train import hardware
from ouroboros.train.hardware import Hardware, choose_size, detect

PRESETS = (("beast", 12.0), ("pro", 6.0), ("lite", 0.0))


def cuda(memory: float) -> Hardware:
    return Hardware(threads=8, memory=64.0, device="T4", device_memory=memory)


@pytest.mark.parametrize(
    ("found", "size", "reason"),
    [
        (Hardware(threads=2, memory=24.4), "lite", "no CUDA device; 2 CPU threads, 24 GB of memory"),
        (Hardware(threads=1), "lite", "no CUDA device; 1 CPU thread"),
        (cuda(80.0), "beast", "CUDA device T4 with 80.0 GB; needs 12"),
        (cuda(12.0), "beast", "CUDA device T4 with 12.0 GB; needs 12"),
        (cuda(11.9), "pro", "CUDA device T4 with 11.9 GB; needs 6; beast needs 12"),
        (cuda(4.0), "lite", "CUDA device T4 with 4.0 GB; pro needs 6"),
    ],
)
def test_the_largest_preset_that_fits(found, size, reason):
    assert choose_size(PRESETS, found) == (size, reason)


def test_a_device_too_small_for_every_preset_gets_the_last():
    assert choose_size((("big", 9.0), ("less", 5.0)), cuda(1.0))[0] == "less"
    with pytest.raises(OuroborosError, match="no presets"):
        choose_size((), cuda(1.0))


def test_this_machine():
    found = detect()
    assert found.threads == torch.get_num_threads() and found.memory is not None and 0.1 < found.memory < 1e5
    assert (found.device is None) == (not torch.cuda.is_available())
    assert choose_size(PRESETS) == choose_size(PRESETS, found)


def test_the_smallest_of_several_devices_counts(monkeypatch):
    devices = [SimpleNamespace(name=name, total_memory=memory) for name, memory in (("A", 24e9), ("B", 8e9))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    found = detect()
    assert (found.device, found.device_memory) == ("B", 8.0) and choose_size(PRESETS)[0] == "pro"


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    monkeypatch.delattr(hardware.os, "sysconf")
    assert detect().memory is None
