"""Errors that a user can cause and mend. The command line prints them as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OuroborosError(ValueError):
    """Bad input: the message names the field, file or line and the fix."""


class Diverged(OuroborosError):
    """Losses, states or scores left all bounds. That is what a model or its recipe does, so the same attempt once more
    would end alike."""


class UsageError(OuroborosError):
    """The command line itself is wrong."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` for the closest known name, or the list of known names.

    >>> nearest("lop", ["loop", "gpt"])
    "; did you mean 'loop'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def check(condition: bool, message: str) -> None:
    """Raise :class:`OuroborosError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise OuroborosError(message)


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of what ``error`` says; if it says nothing, ``otherwise`` or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if otherwise is None else otherwise
