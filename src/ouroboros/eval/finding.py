"""How the checks of the audit and the harness are run, and what they find.

A check is a function that returns a sentence on what agreed how closely, or raises :class:`Mismatch`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ouroboros.errors import OuroborosError
from ouroboros.eval.stats import Record

logger = logging.getLogger(__name__)


class Mismatch(Exception):
    """The two sides of a check differ."""


@dataclass(frozen=True, kw_only=True)
class Finding(Record):
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str
    """What was compared and how closely it agreed, or what went wrong."""
    seconds: float = 0.0
    """Wall-clock time the check took."""


def find(name: str, check: Callable[..., str], *given: Any) -> Finding:
    """Run one check. Whatever a faulty part raises is that part's failure, and the other checks go on."""
    start = time.perf_counter()
    try:
        ok, detail = True, check(*given)
    except (Mismatch, OuroborosError) as error:
        ok, detail = False, str(error)
    except Exception as error:
        logger.debug("check %s failed", name, exc_info=True)
        ok, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Finding(name=name, ok=ok, detail=detail, seconds=time.perf_counter() - start)


def require(condition: bool, message: str) -> None:
    """Raise :class:`Mismatch` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise Mismatch(message)


def equal(found: Any, expected: Any, what: str) -> None:
    """Raise :class:`Mismatch`, which names both values, unless they are the same."""
    require(found == expected, f"{what}: {found}, expected {expected}")
