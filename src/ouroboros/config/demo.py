"""What the demo trains, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a looped model and its plain twins of equal parameters, two from five minutes on and else one, score them,
    write a page."""

    minutes: float = 10.0
    """Time for everything: what is trained and scored is chosen to fit."""
    out: Path = Path("out/demo")
    """Directory for runs and report.html; must be new or empty. By default out/demo, or out/demo-2 and so on."""
    data: str = "python:"
    """Text to learn; by default the source of Python's standard library, which every machine has."""
    size: str | None = None
    """The size: tiny, small or base; None chooses by the speed of this machine and the time."""
    tokenizer: str | None = None
    """Tokenizer, see `ouroboros train`; bytes for small or binary files. None chooses as for the size."""
    seed: int = 0
    """Seed of initialisation, of the order of the text and of the samples."""
    json: bool = False
    """Print one JSON object instead of the table."""
