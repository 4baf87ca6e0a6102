"""The crawler, a U-net around shared blocks, and Helix, two streams side by side (docs/systems/crawler.md)."""

from __future__ import annotations

import ouroboros.systems.crawler.parts  # noqa: F401  registers what only the published program has
from ouroboros.registry import System

SYSTEM = System(
    name="crawler",
    title="Crawler",
    entries={
        "recipes": {
            "crawler": "ouroboros.systems.crawler.recipe:CRAWLER",
            "crawler-published": "ouroboros.systems.crawler.recipe:CRAWLER_PUBLISHED",
            "helix": "ouroboros.systems.crawler.recipe:HELIX",
        },
        "readers": {"crawler": "ouroboros.systems.crawler.checkpoint:READER"},
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
