"""R-HRM: one shared block in a loop, latent attention, a data pipeline and a chat."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="rhrm",
    title="R-HRM",
    entries={
        "formats": {
            "rhrm-published": "ouroboros.systems.rhrm.data:PUBLISHED_FORMAT",
        },
        "mixtures": {
            "rhrm": "ouroboros.systems.rhrm.data:MIXTURE",
        },
        "shares": {
            "rhrm": "ouroboros.systems.rhrm.data:shares_of",
        },
    },
)
