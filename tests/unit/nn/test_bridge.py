"""The affine map behind a loop."""

from __future__ import annotations

import torch
from torch import nn

from ouroboros.config.parts.loop import BridgeSpec
from ouroboros.nn.bridge import Bridge


def test_bridge_is_an_affine_map_of_both_states_and_neutral_at_zero() -> None:
    bridge = Bridge(BridgeSpec(), 6, 1, 1e-6)
    z, x0 = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    assert bridge.finish(z, {"x0": x0}).equal(z)
    nn.init.normal_(bridge.proj.weight)
    nn.init.normal_(bridge.proj.bias)
    W = bridge.proj.weight
    wanted = z + z @ W[:, :6].T + x0 @ W[:, 6:].T + bridge.proj.bias
    torch.testing.assert_close(bridge.finish(z, {"x0": x0}), wanted)
    assert sum(p.numel() for p in bridge.parameters()) == BridgeSpec().parameters(6, 1)
