"""The published table without a use: its count."""

from __future__ import annotations

from ouroboros.config import AttentionSpec, ModelSpec
from ouroboros.systems.crawler.parts import UnconnectedValuesSpec


def test_cost() -> None:
    """As the submission has it: 1024 rows of 128 numbers, a map to 4 heads of 64, a scalar, a factor for 2 blocks."""
    model = ModelSpec(vocab_size=1024, hidden_size=512).replace(mixer=AttentionSpec(num_heads=8, num_kv_heads=4))
    spec = UnconnectedValuesSpec()
    assert spec.parameters(model) == 1024 * 128 + 128 * 256 + 1 + 2 == 163_843
    assert spec.flops(model) == 0 and spec.provides == ""
