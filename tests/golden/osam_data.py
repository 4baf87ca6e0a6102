"""Golden cases of OSAM's published data: where its training windows start.

The library draws its windows otherwise, so the case holds what the page says of the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file


def published_starts(tokens: int, sequence_length: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of starts without end: drawn from 0 up to but not including ``tokens - sequence_length - 1``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(tokens - sequence_length - 1, (batch_size,), generator=generator).numpy()


def batch_starts(case: dict[str, Any], path: Path, work: Path) -> None:
    """The starts of the first batches of each loader, ``[batches, batch]``, equal to the last digit."""
    tensors = load_file(path.with_suffix(".safetensors"))
    assert case["loaders"]
    for loader in case["loaders"]:
        expected = tensors[loader["tensor"]]
        starts = published_starts(loader["corpus_length"], loader["seq"], loader["batch"], loader["seed"])
        found = np.stack(list(itertools.islice(starts, len(expected))))
        assert found.dtype == expected.dtype and np.array_equal(found, expected), loader
        bound = loader["exclusive_upper_bound"]
        assert found.max() < bound == loader["corpus_length"] - loader["seq"] - 1, loader


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {"batch_starts": batch_starts}
"""Checker of each kind of case."""
