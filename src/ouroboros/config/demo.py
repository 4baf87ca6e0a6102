"""What the demo trains, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a looped model and its plain twin with equal parameters, score both, write a page."""

    minutes: float = 10.0
    """Time for everything, on two cores."""
    out: Path = Path("out/demo")
    """Directory for runs and report.html; must be new or empty. By default out/demo, or out/demo-2 and so on."""
    data: str = "python:"
    """Text to learn; by default the source of Python's standard library, which every machine has."""
    size: str = "small"
    """tiny, small or base."""
    tokenizer: str = "bpe:2048"
    """Tokenizer, see `ouroboros train`; bytes for small or binary files."""
    seed: int = 0
    json: bool = False
    """Print one JSON object instead of the table."""
