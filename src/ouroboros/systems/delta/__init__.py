"""The delta residual (OUROBOROS, Deep Delta Learning; arXiv 2601.00417) and its published Python interface::

from ouroboros.systems.delta import OuroborosConfig, OuroborosModel

model = OuroborosModel(OuroborosConfig(hidden_size=256, num_hidden_layers=4, head_dim=64, num_attention_heads=4))
logits, loss = model(input_ids, targets=next_ids)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ouroboros.registry import System, load

if TYPE_CHECKING:
    from ouroboros.systems.delta.config import OuroborosConfig
    from ouroboros.systems.delta.published import OuroborosModel

__all__ = ["SYSTEM", "OuroborosConfig", "OuroborosModel"]

SYSTEM = System(
    name="delta",
    title="Deep Delta Learning",
    entries={
        "recipes": {
            "delta": "ouroboros.systems.delta.recipe:DELTA",
            "delta-published": "ouroboros.systems.delta.recipe:DELTA_PUBLISHED",
        },
        "readers": {"delta": "ouroboros.systems.delta.checkpoint:READER"},
        "sections": {"the delta residuals": "ouroboros.systems.delta.report:section"},
    },
)


def __getattr__(name: str) -> Any:
    """The published classes on first use: the model needs torch, and listing the systems must not."""
    if name in ("OuroborosConfig", "OuroborosModel"):
        return load(f"{__name__}.{'config' if name == 'OuroborosConfig' else 'published'}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
