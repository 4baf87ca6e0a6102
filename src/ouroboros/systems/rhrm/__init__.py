"""R-HRM: one block visited several times, latent attention, a learned prefix (docs/systems/r-hrm.md)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="rhrm",
    title="R-HRM",
    entries={
        "recipes": {
            "rhrm": "ouroboros.systems.rhrm.recipe:RHRM",
            "rhrm-published": "ouroboros.systems.rhrm.recipe:RHRM_PUBLISHED",
        },
        "readers": {"rhrm": "ouroboros.systems.rhrm.checkpoint:READER"},
        "styles": {"rhrm": "ouroboros.systems.rhrm.sampling:STYLE"},
        "formats": {"rhrm-published": "ouroboros.systems.rhrm.data:PUBLISHED_FORMAT"},
        "mixtures": {"rhrm": "ouroboros.systems.rhrm.data:MIXTURE"},
    },
)
