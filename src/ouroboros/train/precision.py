"""Precision and compilation, chosen by measurement on the machine at hand."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ouroboros.accounting import training_flops
from ouroboros.config import Recipe, TrainSpec

logger = logging.getLogger(__name__)

COMPILED = "compile: per block"
"""What :func:`compile_blocks` says when it has compiled."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was chosen when a run began. A resumed run keeps it, because each of them decides how sums are rounded."""

    dtype: torch.dtype
    """The precision of the forward and backward pass; float32 means that autocast is off."""
    muon_dtype: torch.dtype
    """The precision in which Muon orthogonalises."""
    threads: int
    """The number of threads of each process."""
    threads_now: int | None = None
    """The number while other programs use the processor, less than ``threads``; None means all of them."""
    compile: Literal["on", "off"] | None = None
    """Whether the blocks are compiled; None while that is not known yet."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = {"dtype": _name(self.dtype), "muon_dtype": _name(self.muon_dtype)}
        return names | {"threads": self.threads, "threads_now": self.threads_now, "compile": self.compile}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Choices:
        """The choices that :meth:`to_dict` gave; checkpoints older than a choice have what was done then."""
        return cls(
            dtype=getattr(torch, saved["dtype"]),
            muon_dtype=getattr(torch, saved.get("muon_dtype", "bfloat16")),
            threads=saved.get("threads", torch.get_num_threads()),
            threads_now=saved.get("threads_now"),
            compile=saved.get("compile"),
        )

    def describe(self) -> str:
        """Threads and Muon's precision, for people."""
        return f"{self.threads} thread{'s' * (self.threads != 1)}, Muon in {_name(self.muon_dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_device() -> torch.device:
    """CUDA when there is one, else the CPU. (CUDA paths are not exercised by the test suite.)"""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.cache
def matmul_peak(device_type: str, dtype: torch.dtype, seconds: float = 0.3, size: int | None = None) -> float:
    """Operations per second of a large matrix product, measured; the progress line compares training with it.

    A product of two N x N matrices counts as 2 N^3 operations.
    """
    size = size or (1024 if device_type == "cpu" else 8192)
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
    """The precision of training: bfloat16 if its matrix products are at least 1.5 times as fast as those of float32."""
    if spec.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.precision]
    # A processor without bfloat16 units takes seconds for a large product: a small one tells it from all others.
    if matmul_peak(device.type, torch.bfloat16, 0.02, 256) < matmul_peak(device.type, torch.float32, 0.02, 256):
        return torch.float32
    ratio = matmul_peak(device.type, torch.bfloat16) / matmul_peak(device.type, torch.float32)
    return torch.bfloat16 if ratio >= 1.5 else torch.float32


PAYS_AFTER = {torch.float32: 900.0, torch.bfloat16: 150.0}
"""Seconds of training from which compiling pays. Compiling takes about half a minute on two cores, the first time on a
machine. A compiled step takes a tenth less time in float32, and half the time in bfloat16 (docs/benchmarks.md)."""


def expected_seconds(recipe: Recipe, device: torch.device, dtype: torch.dtype, processes: int = 1) -> float:
    """The length of a run: its time budget, or an estimate from its arithmetic.

    Training reaches about a third of the measured matrix-product peak in float32 and an eighth in bfloat16, where
    products are so fast that everything else takes most of the time (docs/benchmarks.md).
    """
    spec, length = recipe.train, recipe.data.sequence_length
    if spec.minutes is not None:
        return 60 * spec.minutes
    tokens = spec.tokens if spec.tokens is not None else (spec.steps or 0) * spec.batch_size * length
    share = 0.33 if dtype == torch.float32 else 0.125
    flops = training_flops(recipe.model, spec.loops, (length + 1) // 2)
    return tokens * flops / (share * matmul_peak(device.type, dtype)) / processes


def compile_pays(seconds: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a run of so many seconds is long enough to be compiled, and there is a compiler."""
    return seconds >= PAYS_AFTER[dtype] and missing_compiler(device) is None


def compile_blocks(
    blocks: nn.ModuleList,
    spec: TrainSpec,
    device: torch.device,
    expected_seconds: float,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Compile every block in place, if asked or if it pays; returns a line that says what was done and why.

    Args:
        blocks: the model's blocks; equal blocks share one compiled program.
        spec: its field ``compile`` asks for it (``on``), forbids it (``off``) or leaves it open (``auto``).
        device: where the blocks run.
        expected_seconds: length of the run; ``auto`` compiles those that are as long as :data:`PAYS_AFTER`.
        dtype: the precision of training.
    """
    if spec.compile == "off":
        return "compile: off"
    missing = missing_compiler(device)
    if missing is not None:
        if spec.compile == "on":
            logger.warning("compile: %s; training runs uncompiled", missing)
        return f"compile: off ({missing})"
    if spec.compile == "auto" and expected_seconds < PAYS_AFTER[dtype]:
        return "compile: off (the run is too short for it to pay)"
    for block in blocks:
        block.compile(dynamic=False)
    return COMPILED


@contextlib.contextmanager
def uncompiled(blocks: nn.ModuleList) -> Iterator[None]:
    """Within the context the blocks run uncompiled."""
    kept = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for block, program in zip(blocks, kept, strict=True):
            block._compiled_call_impl = program


def missing_compiler(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work here, or None when it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler on this machine"
    return None


def from_compiler(error: Exception) -> bool:
    """Whether ``error`` was raised by ``torch.compile`` itself, not by the code it compiles."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
