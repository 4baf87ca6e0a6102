"""Checks of what the crawler does to token ids: the rows of the hashed bigram table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.stem import NgramSpec
from ouroboros.nn.memory import behind

Tensors = dict[str, Tensor]


def bigram(case: dict[str, Any], tensors: Tensors) -> None:
    """The row of every pair of tokens, for each size of the table."""
    ids = tensors["bigram.ids"]
    sizes = [int(name.removeprefix("bigram.bucket")) for name in tensors if name.startswith("bigram.bucket")]
    assert sizes
    for size in sizes:
        part = build(NgramSpec(buckets=size), ModelSpec(vocab_size=int(ids.max()) + 1))
        assert torch.equal(part.hashes(behind(None, ids + 1, 1), 2), tensors[f"bigram.bucket{size}"]), size


GROUPS: dict[str, Callable[[dict[str, Any], Tensors], None]] = {"bigram": bigram}
"""The check of each group of tensors, by the beginning of their names."""
