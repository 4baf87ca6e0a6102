"""The delta residual (Deep Delta Learning; arXiv 2601.00417)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="delta",
    title="Deep Delta Learning",
    entries={
        "sections": {
            "the delta residuals": "ouroboros.systems.delta.report:section",
        },
    },
)
