"""What a server tells of its model without running it: loop counts, their cost, the schedule, the memory it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ouroboros.accounting import cost
from ouroboros.config import ModelSpec, Recipe
from ouroboros.errors import check
from ouroboros.schedule import Schedule
from ouroboros.train.hardware import memory_gb

BYTES = 4
"""Of a weight and of a cached number: float32."""
SHARE = 4
"""A request may ask for so many times the loops that training went up to, unless the server says otherwise."""


def trained_loops(spec: ModelSpec, recipe: Recipe | None) -> tuple[int, int]:
    """The smallest and the largest loop count that a model was trained with, as far as its recipe tells."""
    usual = spec.schedule.loops
    if recipe is None or not spec.schedule.is_looped:
        return usual, usual
    training = recipe.train.loops
    if training.curriculum:
        counts = [count for _, count in training.curriculum]
        return min(counts), max(counts)
    return (usual, usual) if training.sampling == "fixed" else (training.min, training.max)


def most_loops(spec: ModelSpec, trained: tuple[int, int], given: int | None) -> int:
    """The largest loop count that a request may ask for: ``given``, or four times what training went up to."""
    usual = spec.schedule.loops
    if not spec.schedule.is_looped:
        return usual
    check(given is None or given >= usual, f"--max-loops must be at least the model's {usual}, got {given}")
    return SHARE * max(usual, trained[1]) if given is None else given


def loop_costs(spec: ModelSpec, most: int, context: int) -> list[dict[str, int]]:
    """For each loop count from 1 to ``most``: operations and cached bytes for a token that attends to ``context``."""
    counts = range(1, most + 1) if spec.schedule.is_looped else [spec.schedule.loops]
    found = [(loops, cost(spec, context=context, loops=loops if spec.schedule.is_looped else None)) for loops in counts]
    return [
        {"loops": loops, "flops_per_token": c.flops_per_token, "cache_bytes_per_token": c.cache_bytes_per_token(BYTES)}
        for loops, c in found
    ]


def segments(schedule: Schedule) -> list[dict[str, Any]]:
    """The schedule for a drawing: for each segment its blocks, and whether they are repeated."""
    return [{"blocks": list(s.blocks), "looped": s.looped, "loops": s.loops} for s in schedule.segments]


def check_memory(spec: ModelSpec, *, rows: int, context: int, loops: int, available: int | None = None) -> int:
    """The bytes that a server needs: weights, and the caches of ``rows`` sequences of ``context`` tokens.

    Args:
        spec: the model.
        rows: answers that are written at once.
        context: tokens of each.
        loops: the largest loop count of a request.
        available: bytes that are free; None asks the system, and checks nothing where that does not tell.

    Raises:
        OuroborosError: more than is free; says what needs how much, and what to change.
    """
    looped = spec.schedule.is_looped
    total = cost(spec, context=context, loops=loops if looped else None)
    weights = total.parameters * BYTES
    caches = rows * (context * total.cache_bytes_per_token(BYTES) + total.state_bytes(BYTES))
    free = available_memory() if available is None else available
    at = f" at {loops} loops" if looped else ""
    check(
        free is None or weights + caches <= free,
        f"the model needs about {(weights + caches) / 1e9:,.2f} GB of memory ({weights / 1e9:,.2f} for weights,"
        f" {caches / 1e9:,.2f} for {rows} answers of {context} tokens{at}), but {(free or 0) / 1e9:,.2f} GB are free;"
        " lower --batch, --context or --max-loops, or take a smaller model",
    )
    return weights + caches


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within the limit of a container; None where the system does not tell."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [] if limit == "max" else [max(int(limit) - int(used), 0)]
    except (OSError, ValueError):
        pass
    if not found and (physical := memory_gb()) is not None:
        found.append(round(physical * 1e9))
    return min(found, default=None)
