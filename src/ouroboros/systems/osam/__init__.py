"""OSAM, the one-shot algebraic map: a memory of constant size instead of a cache (docs/systems/osam.md)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="osam",
    title="OSAM",
    entries={
        "styles": {
            "osam": "ouroboros.systems.osam.sampling:STYLE",
        },
    },
)
