"""The published Python interface under the path it first had; it is :mod:`ouroboros.systems.delta` now."""

from __future__ import annotations

from typing import Any

from ouroboros.registry import load


def __getattr__(name: str) -> Any:
    """The class ``name`` of the system, imported on first use."""
    if name in ("OuroborosConfig", "OuroborosModel"):
        return load(f"ouroboros.systems.delta:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
