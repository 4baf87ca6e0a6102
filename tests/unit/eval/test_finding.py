"""Checks are run one by one, and their failures become findings."""

from __future__ import annotations

import json

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.eval.finding import Finding, Mismatch, equal, find, require


def test_to_dict() -> None:
    found = Finding(name="causal", ok=True, detail="3 cuts", seconds=0.5)
    assert json.loads(json.dumps(found.to_dict())) == {"name": "causal", "ok": True, "detail": "3 cuts", "seconds": 0.5}


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (Mismatch("left and right"), "left and right"),
        (OuroborosError("field: the fix"), "field: the fix"),
        (RuntimeError("first line\n\n  second line"), "RuntimeError: first line second line"),
    ],
)
def test_failures_become_findings(error: Exception, detail: str) -> None:
    def check(given: int) -> str:
        if given:
            raise error
        return "fine"

    good, bad = find("a", check, 0), find("a", check, 1)
    assert (good.name, good.ok, good.detail, bad.ok, bad.detail) == ("a", True, "fine", False, detail)
    assert good.seconds >= 0


def test_what_ends_the_program_is_no_finding() -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("a", interrupted)


def test_comparisons() -> None:
    equal(3, 3, "x")
    with pytest.raises(Mismatch, match="x: 3, expected 4"):
        equal(3, 4, "x")
    require(True, "y")
    with pytest.raises(Mismatch, match="y"):
        require(False, "y")
