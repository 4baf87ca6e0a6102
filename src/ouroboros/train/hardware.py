"""What this machine has to train with, and which of a recipe's presets fits it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What this process may use."""

    threads: int
    """Threads of the CPU that torch uses."""
    memory: float | None = None
    """GB (1e9 bytes) of the machine's memory; None where the system does not tell."""
    device: str | None = None
    """Name of the CUDA device with the least memory, None without one."""
    device_memory: float = 0.0
    """Its memory in GB."""


def detect() -> Hardware:
    """The hardware of this machine. Of several CUDA devices the smallest counts: each process trains on one."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    least = min(found, key=lambda device: device.total_memory, default=None)
    return Hardware(
        threads=torch.get_num_threads(),
        memory=_memory(),
        device=None if least is None else least.name,
        device_memory=0.0 if least is None else least.total_memory / 1e9,
    )


def choose_size(presets: Sequence[tuple[str, float]], hardware: Hardware | None = None) -> tuple[str, str]:
    """The preset that fits, and why, in words.

    Args:
        presets: size and the GB of CUDA memory it needs, largest first; the last one serves without CUDA.
        hardware: by default that of this machine.

    Raises:
        OuroborosError: no presets.
    """
    check(bool(presets), "choose_size: no presets to choose from")
    found = detect() if hardware is None else hardware
    if found.device is None:
        threads = f"{found.threads} CPU thread{'s' * (found.threads != 1)}"
        memory = "" if found.memory is None else f", {found.memory:.0f} GB of memory"
        return presets[-1][0], f"no CUDA device; {threads}{memory}"
    device = f"CUDA device {found.device} with {found.device_memory:.1f} GB"
    fitting = [index for index, (_, need) in enumerate(presets) if found.device_memory >= need]
    chosen = fitting[0] if fitting else len(presets) - 1
    size, need = presets[chosen]
    reasons = [f"needs {need:g}"] if need else []
    reasons += [f"{larger} needs {more:g}" for larger, more in presets[max(chosen - 1, 0) : chosen]]
    return size, "; ".join([device, *reasons])


def _memory() -> float | None:
    """GB of physical memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None
