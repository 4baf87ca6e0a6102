"""Golden cases of OSAM's published data: where its training windows start."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ouroboros.systems.osam.data import published_starts


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
