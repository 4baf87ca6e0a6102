"""The crawler: flat blocks around shared ones that are visited several times (docs/systems/crawler.md)."""

from __future__ import annotations

from ouroboros.registry import System

SYSTEM = System(
    name="crawler",
    title="Crawler",
    entries={
        "scorings": {
            "challenge": "ouroboros.systems.crawler.score:challenge",
            "challenge-published": "ouroboros.systems.crawler.score:CHALLENGE_PUBLISHED",
        },
        "adaptations": {
            "slot": "ouroboros.systems.crawler.slot:Slot",
            "slot-published": "ouroboros.systems.crawler.slot:PUBLISHED",
        },
    },
)
