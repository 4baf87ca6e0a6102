"""The outcome of one check, as the audit and the harness report it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str
    """What was compared and how closely it agreed, or what went wrong."""
    seconds: float = 0.0
    """Wall-clock time the check took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
