"""OSAM, the one-shot algebraic map: a sequence mixer whose memory has a constant size."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="osam",
    title="OSAM",
    entries={
        "sources": {
            "needle": "ouroboros.systems.osam.data:needle_text",
            "periodic": "ouroboros.systems.osam.data:periodic_text",
        },
    },
)
