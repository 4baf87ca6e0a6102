"""The loss from logits is torch's, smoothed or not."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ouroboros.train.losses import cross_entropy, smoothed_cross_entropy


@given(st.integers(0, 2**32), st.floats(0.01, 0.99))
def test_smoothing_of_any_share(seed, smoothing):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float32)
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    targets[0, : seed % 6] = -100
    smoothed, plain = smoothed_cross_entropy(logits, targets, smoothing)
    flat = logits.flatten(0, 1), targets.flatten()
    torch.testing.assert_close(smoothed, nn.functional.cross_entropy(*flat, label_smoothing=smoothing))
    torch.testing.assert_close(plain, cross_entropy(logits, targets))
