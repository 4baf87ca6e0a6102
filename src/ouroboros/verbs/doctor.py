"""``ouroboros doctor``: what this machine and this installation can do, and what is missing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ouroboros.errors import check
from ouroboros.verbs.options import Json, emit_json, parse, say

DISTRIBUTION = "ouroboros-lm"
EXTRAS = {
    "report": "pages about runs",
    "serve": "ouroboros serve",
    "eval": "ouroboros eval --tasks",
    "gguf": "reading and writing GGUF files",
    "cluster": "studies on several machines",
    "interop": "fine-tuning with peft and trl",
}
"""What each extra is for; those of developers are not listed."""
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
"""Units that make training or decoding faster, by their names in Linux, on x86 and Arm."""
COPIED = 128_000_000
"""Bytes that are copied to measure the memory: more than a cache holds, on most processors."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Say which versions are installed, what the processor can do, how fast it and the memory are now, and what is
    missing. Other programs that run meanwhile make the measured numbers smaller."""

    seconds: float = 0.3
    """How many seconds each product of matrices and each copy is repeated for."""
    json: Json = False

    def __post_init__(self) -> None:
        check(self.seconds > 0, f"--seconds must be > 0, got {self.seconds}")


def doctor(arguments: Sequence[str]) -> int:
    """The verb ``doctor``."""
    options = parse(DoctorOptions, "doctor", arguments)
    import torch

    from ouroboros.config import TrainSpec
    from ouroboros.train.precision import choose_device, choose_dtype, missing_compiler

    device = choose_device()
    compiler = missing_compiler(device)
    missing = list(missing_packages())
    if compiler is not None:
        missing.append({"what": "a C++ compiler", "for": "torch.compile, in long training", "fix": "install g++"})
    facts: dict[str, Any] = {
        "versions": versions(),
        "processor": processor(),
        "cuda": [_gpu(torch.cuda.get_device_properties(n)) for n in range(torch.cuda.device_count())],
        "peaks": peaks(options.seconds),
        "training": {
            "device": device.type,
            "precision": str(choose_dtype(TrainSpec(), device)).removeprefix("torch."),
            "compile": compiler is None,
        },
        "missing": missing,
    }
    if options.json:
        emit_json(facts)
    else:
        _show(facts)
    return 0


def _gpu(found: Any) -> dict[str, Any]:
    return {"name": found.name, "memory_gb": found.total_memory / 1e9}


def _requirements(distribution: str, extras: set[str]) -> Iterator[Requirement]:
    """What ``distribution`` needs on this machine: for each of ``extras``, or, without any, always."""
    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if (not extras and always) or (
            marker is not None and not always and any(marker.evaluate({"extra": extra}) for extra in extras)
        ):
            yield requirement


def _unmet(distribution: str, extras: set[str]) -> Iterator[str]:
    """The requirements that are not installed, or in another version."""
    for requirement in _requirements(distribution, extras):
        found = _version(requirement.name)
        if found is None:
            yield f"{requirement.name}{requirement.specifier}"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier} (installed: {found})"
        elif requirement.extras:
            yield from _unmet(requirement.name, requirement.extras)


def missing_packages() -> Iterator[dict[str, str]]:
    """``what`` is missing, what it is ``for``, and how to ``fix`` it."""
    if _version(DISTRIBUTION) is None:
        yield {"what": DISTRIBUTION, "for": "knowing what else is missing", "fix": "pip install . in the source tree"}
        return
    for extra, purpose in {"": "ouroboros", **EXTRAS}.items():
        if unmet := list(_unmet(DISTRIBUTION, {extra} - {""})):
            name = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
            yield {"what": ", ".join(unmet), "for": purpose, "fix": f"pip install '{name}'"}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of the library, of Python and of what the library always needs; None is not installed."""
    import ouroboros

    needed = _requirements(DISTRIBUTION, set()) if _version(DISTRIBUTION) else ()
    return {
        "ouroboros": ouroboros.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{requirement.name: _version(requirement.name) for requirement in needed},
    }


def processor() -> dict[str, Any]:
    """Name, processors that this process may use, threads, units (:data:`FEATURES`) and memory in GB of 1e9 bytes.
    What the system does not tell is None."""
    import torch

    from ouroboros.train.hardware import memory_gb

    described: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).is_file():
        pairs = (line.partition(":") for line in info.read_text(errors="replace").splitlines())
        described = {name.strip().lower(): value.strip() for name, _, value in pairs}
    flags = described.get("flags", described.get("features"))
    return {
        "name": described.get("model name", platform.processor() or platform.machine()),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "features": None if flags is None else [name for name in FEATURES if name in flags.split()],
        "memory_gb": memory_gb(),
    }


def peaks(seconds: float) -> list[dict[str, Any]]:
    """Measured with one thread and with all: GFLOP/s of products of matrices, and GB/s of a copy in memory.

    Args:
        seconds: the least time of each measurement.
    """
    import torch

    from ouroboros.train.precision import matmul_peak

    measure: Callable[..., float] = matmul_peak.__wrapped__  # it keeps results, and not by the number of threads
    everything, rows = torch.get_num_threads(), []
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    try:
        for threads in sorted({1, everything}):
            torch.set_num_threads(threads)
            float32 = measure("cpu", torch.float32, seconds)
            # Without bfloat16 units a large product takes seconds, and a small one tells as much.
            emulated = measure("cpu", torch.bfloat16, 0.02, 256) < measure("cpu", torch.float32, 0.02, 256)
            bfloat16 = measure("cpu", torch.bfloat16, seconds, 256 if emulated else None)
            copied = 2 * COPIED / _shortest(lambda: target.copy_(source), seconds)
            rows.append(
                {"threads": threads, "float32_gflops": float32 / 1e9, "bfloat16_gflops": bfloat16 / 1e9}
                | {"memory_gb_per_second": copied / 1e9}
            )
    finally:
        torch.set_num_threads(everything)
    return rows


def _shortest(act: Callable[[], object], seconds: float) -> float:
    """The shortest time that ``act`` took, repeated for so many ``seconds``; the first time does not count."""
    act()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while shortest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        act()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _show(facts: dict[str, Any]) -> None:
    width = max(map(len, facts["versions"]))
    for name, version in facts["versions"].items():
        say(f"{name:<{width}}  {version or 'not installed'}")
    found = facts["processor"]
    features = "not known" if found["features"] is None else ", ".join(found["features"]) or "none of those that help"
    memory = "" if found["memory_gb"] is None else f", {found['memory_gb']:.1f} GB of memory"
    say(f"\n{found['name']}: {found['processors']} processors{memory}; torch uses {found['torch_uses']}")
    say(f"units: {features}")
    for gpu in facts["cuda"]:
        say(f"CUDA: {gpu['name']} with {gpu['memory_gb']:.1f} GB")
    say("\nthreads  float32 GFLOP/s  bfloat16 GFLOP/s  memory GB/s")
    for row in facts["peaks"]:
        say(
            f"{row['threads']:>7}  {row['float32_gflops']:>15.1f}  {row['bfloat16_gflops']:>16.1f}"
            f"  {row['memory_gb_per_second']:>11.1f}"
        )
    say(f"training takes {facts['training']['precision']} on {facts['training']['device']}")
    say("\nnothing is missing" if not facts["missing"] else "\nmissing:")
    for one in facts["missing"]:
        say(f"  {one['what']}, for {one['for']}: {one['fix']}")
