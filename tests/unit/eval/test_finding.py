"""Findings as JSON values."""

from __future__ import annotations

import json

from ouroboros.eval.finding import Finding


def test_to_dict() -> None:
    found = Finding(name="causal", ok=True, detail="3 cuts", seconds=0.5)
    assert json.loads(json.dumps(found.to_dict())) == {"name": "causal", "ok": True, "detail": "3 cuts", "seconds": 0.5}
