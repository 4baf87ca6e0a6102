"""Which of a recipe's presets fits this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence


def choose_size(presets: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """The preset that fits, and why, in words.

    Args:
        presets: size and the GB (1e9 bytes) of CUDA memory it needs, largest first; the last one serves without CUDA.
            There is at least one. Of several CUDA devices the smallest counts: each process trains on one.
    """
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    device = min(found, key=lambda device: device.total_memory, default=None)
    if device is None:
        threads, memory = torch.get_num_threads(), memory_gb()
        known = "" if memory is None else f", {memory:.0f} GB of memory"
        return presets[-1][0], f"no CUDA device; {threads} CPU thread{'s' * (threads != 1)}{known}"
    memory = device.total_memory / 1e9
    fitting = [index for index, (_, need) in enumerate(presets) if memory >= need]
    chosen = fitting[0] if fitting else len(presets) - 1
    size, need = presets[chosen]
    reasons = [f"CUDA device {device.name} with {memory:.1f} GB"] + ([f"needs {need:g}"] if need else [])
    reasons += [f"{larger} needs {more:g}" for larger, more in presets[max(chosen - 1, 0) : chosen]]
    return size, "; ".join(reasons)


def memory_gb() -> float | None:
    """GB of physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None
