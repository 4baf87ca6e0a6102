"""R-HRM: one block visited several times, latent attention, a learned prefix (docs/systems/r-hrm.md)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="rhrm",
    title="R-HRM",
    entries={
        "sections": {
            "the published R-HRM pipeline": "ouroboros.systems.rhrm.report:section",
        },
    },
)
