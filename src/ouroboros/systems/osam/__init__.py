"""OSAM, the one-shot algebraic map: a memory of constant size instead of a cache (docs/systems/osam.md)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="osam",
    title="OSAM",
    entries={
        "recipes": {
            "osam": "ouroboros.systems.osam.recipe:OSAM",
            "osam-published": "ouroboros.systems.osam.recipe:OSAM_PUBLISHED",
        },
        "readers": {"osam": "ouroboros.systems.osam.checkpoint:READER"},
        "writers": {"osam": "ouroboros.systems.osam.export:write"},
        "telemetry": {"osam": "ouroboros.systems.osam.measure:part_records"},
        "styles": {"osam": "ouroboros.systems.osam.sampling:STYLE"},
        "sources": {
            "needle": "ouroboros.systems.osam.data:needle_text",
            "periodic": "ouroboros.systems.osam.data:periodic_text",
        },
    },
)
