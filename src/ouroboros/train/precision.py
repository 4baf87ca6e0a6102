"""Precision and compilation, chosen by measurement on the machine at hand."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator

import torch
from torch import nn

from ouroboros.config import TrainSpec

logger = logging.getLogger(__name__)

COMPILED = "compile: per block"
"""What :func:`compile_blocks` says when it has compiled."""


def choose_device() -> torch.device:
    """CUDA when there is one, else the CPU. (CUDA paths are not exercised by the test suite.)"""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.cache
def matmul_peak(device_type: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measured operations per second of a large matrix product (2 N^3 counted): the roof of the progress line."""
    size = 1024 if device_type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device_type) for _ in range(2))
    a @ b  # first call allocates and selects kernels
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device_type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def choose_dtype(spec: TrainSpec, device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are measured at least 1.5 times as fast as float32's, else float32."""
    if spec.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.precision]
    ratio = matmul_peak(device.type, torch.bfloat16) / matmul_peak(device.type, torch.float32)
    return torch.bfloat16 if ratio >= 1.5 else torch.float32


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Automatic mixed precision for ``dtype`` bfloat16; nothing for float32."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield


def compile_blocks(blocks: nn.ModuleList, spec: TrainSpec, device: torch.device, expected_seconds: float | None) -> str:
    """Compile every block in place, if asked or if it pays; returns a line that says what was done and why.

    Args:
        blocks: the model's blocks; equal blocks share one compiled program.
        spec: ``compile`` on, off or auto.
        device: where they run.
        expected_seconds: length of the run if known. Compilation takes about a minute on two cores and makes a step
            about 1.4 times as fast there, so ``auto`` compiles runs of four minutes and more.
    """
    if spec.compile == "off":
        return "compile: off"
    missing = missing_compiler(device)
    if missing is not None:
        if spec.compile == "on":
            logger.warning("compile: %s; training runs uncompiled", missing)
        return f"compile: off ({missing})"
    if spec.compile == "auto" and expected_seconds is not None and expected_seconds < 240:
        return "compile: off (the run is too short for it to pay)"
    for block in blocks:
        block.compile(dynamic=False)
    return COMPILED


def missing_compiler(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work here, or None when it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler on this machine"
    return None


def from_compiler(error: Exception) -> bool:
    """Whether ``error`` was raised by ``torch.compile`` itself, not by the code it compiles."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
