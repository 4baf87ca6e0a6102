"""Specifications that earlier versions wrote, as today's."""

from __future__ import annotations

from typing import Any

from ouroboros.schedule import parse

_OF_OLD = {"mixer", "ffn", "norm", "residual", "delta", "dropout", "positions", "embedding_norm"}
_OF_OLD |= {"logit_scale", "logit_softcap"}


def written_before_blocks(values: dict[str, Any]) -> bool:
    """Whether a model's JSON is what :func:`from_before_blocks` reads."""
    return "block" not in values and bool(_OF_OLD & values.keys() or isinstance(values.get("loop"), dict))


def from_before_blocks(values: dict[str, Any]) -> dict[str, Any]:
    """A model's JSON from before a block was a specification of its own (versions up to 0.4).

    Then every block had the parts of the model, the residual's kind stood beside options that were always there, and
    loop parts were switches of one specification. What changed nothing is left out; unknown keys are kept, so that they
    are refused by name.
    """
    new, old = {}, dict(values)
    block = {name: old.pop(name) for name in ("mixer", "ffn", "norm", "dropout") if name in old}
    residual, delta = old.pop("residual", "additive"), old.pop("delta", {})
    if isinstance(residual, str):
        block["residual"] = {"kind": residual, **(delta if residual != "additive" else {})}
    if isinstance(block.get("ffn"), dict) and block["ffn"].get("kind") == "none":
        block["ffn"] = {"kind": "none"}
    if isinstance(block.get("mixer"), dict):
        block["mixer"] = {name: value for name, value in block["mixer"].items() if name != "freq_cache"}
    head = {name: old.pop(name) for name in ("logit_scale", "logit_softcap") if name in old}
    stem = [{"kind": "norm"}] if old.pop("embedding_norm", False) else []
    if old.pop("positions", "rope") == "learned":
        stem.append({"kind": "positions"})
    loop = dict(old.pop("loop", None) or {})
    rows = {"rows": loop.pop("max_loops")} if "max_loops" in loop else {}
    new["share_last_kv"] = loop.pop("share_last_kv", False)
    parts: list[dict[str, Any]] = []
    if (mode := loop.pop("inject", "none")) != "none":
        parts.append({"kind": "inject", "mode": mode})
    if loop.pop("embedding", False):
        parts.append({"kind": "embedding", **rows})
    if loop.pop("norm", False):
        parts.append({"kind": "norm", **rows})
    bias = {"bias": loop.pop("gate_bias")} if "gate_bias" in loop else {}
    if loop.pop("gate", False):
        parts.append({"kind": "gate", **bias})
    if (step := loop.pop("contractive", 1.0)) != 1.0:
        parts.append({"kind": "contractive", "step": step})
    layout = old.get("layout")
    if not (isinstance(layout, str) and parse(layout).is_looped):
        parts = []  # they were never built
    return {**new, **old, **loop, "block": block, "head": head, "stem": stem, "loop": parts}
