"""What a visit remembers: recording and prefixing keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros.nn.memory import Prefixed, Recorder


class Growing:
    """Keeps everything, like a cache."""

    def __init__(self) -> None:
        self.k, self.v = torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, 4)

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = torch.cat((self.k, k_BKTC), dim=2), torch.cat((self.v, v_BKTC), dim=2)
        return self.k, self.v


def test_recorder_returns_and_keeps() -> None:
    recorder = Recorder()
    assert recorder.prefix is None
    k, v = torch.randn(2, 1, 3, 5, 4)
    assert recorder.extend(k, v) == (k, v)
    assert recorder.prefix == (k, v)


def test_prefix_without_a_cache() -> None:
    k_prefix, v_prefix = torch.randn(2, 1, 3, 2, 4)
    k, v = torch.randn(2, 2, 3, 5, 4)
    keys, values = Prefixed((k_prefix, v_prefix), None).extend(k, v)
    assert keys.shape == values.shape == (2, 3, 7, 4)
    for row in range(2):
        assert torch.equal(keys[row], torch.cat((k_prefix[0], k[row]), dim=1))
        assert torch.equal(values[row], torch.cat((v_prefix[0], v[row]), dim=1))


def test_prefix_stays_in_front_of_a_growing_cache_and_out_of_it() -> None:
    rest, prefix = Growing(), tuple(torch.randn(2, 1, 3, 2, 4))
    memory = Prefixed((prefix[0], prefix[1]), rest)
    k, v = torch.randn(2, 2, 3, 5, 4)
    memory.extend(k[:, :, :3], v[:, :, :3])
    keys, values = memory.extend(k[:, :, 3:], v[:, :, 3:])
    assert torch.equal(rest.k, k) and torch.equal(rest.v, v)
    assert torch.equal(keys[:, :, 2:], k) and torch.equal(values[:, :, 2:], v)
    assert torch.equal(keys[1, :, :2], prefix[0][0]) and torch.equal(values[1, :, :2], prefix[1][0])


def test_prefix_takes_the_dtype_of_what_follows() -> None:
    prefix = (torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4))
    keys, _ = Prefixed(prefix, None).extend(*torch.randn(2, 1, 3, 1, 4, dtype=torch.bfloat16))
    assert keys.dtype == torch.bfloat16
