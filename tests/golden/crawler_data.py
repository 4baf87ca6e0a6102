"""Golden groups of the challenge's data, in the case ``training``: shards and the order of their tokens.

The case has groups of other subjects too, so whoever checks it calls the functions of :data:`GROUPS`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ouroboros.data.token_shards import read_shard, write_shards
from ouroboros.systems.crawler.data import published_batches

Tensors = dict[str, np.ndarray]


def tensors_of(path: Path) -> Tensors:
    return load_file(path.with_suffix(".safetensors"))


def shard_numbers(tensors: Tensors) -> list[int]:
    found = (re.fullmatch(r"shard(\d+)\.tokens", name) for name in tensors)
    return sorted(int(match[1]) for match in found if match)


def shards(case: dict[str, Any], path: Path, work: Path) -> None:
    """``shard*``: files have the recorded first bytes and give their ids back."""
    tensors = tensors_of(path)
    numbers = shard_numbers(tensors)
    assert [len(tensors[f"shard{number}.tokens"]) for number in numbers] == case["loader"]["shard_lengths"]
    for number in numbers:
        ids, head = tensors[f"shard{number}.tokens"], tensors[f"shard{number}.head_bytes"]
        (file,) = write_shards(work, f"shard{number}", [ids])
        data = file.read_bytes()
        assert data[: len(head)] == head.tobytes() and not any(data[len(head) : 1024])
        assert len(data) == 1024 + 2 * len(ids) and np.array_equal(read_shard(file), ids)


def loader(case: dict[str, Any], path: Path, work: Path) -> None:
    """``loader.*``: the batches of every process."""
    tensors, settings = tensors_of(path), case["loader"]
    stream = [tensors[f"shard{number}.tokens"] for number in shard_numbers(tensors)]
    options = {"global_tokens": settings["global_tokens"], "sequence_length": settings["seq_len"]}
    checked = 0
    for rank in range(settings["world"]):
        found = published_batches(
            stream, **options, grad_accum=settings["grad_accum"], world=settings["world"], rank=rank
        )
        for number, (inputs, targets) in zip(itertools.count(), found):
            name = f"loader.rank{rank}.batch{number}"
            if f"{name}.x" not in tensors:
                break
            assert np.array_equal(inputs, tensors[f"{name}.x"]) and np.array_equal(targets, tensors[f"{name}.y"]), name
            checked += 1
    assert checked == sum(name.startswith("loader.") and name.endswith(".x") for name in tensors) > 0


GROUPS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {"shard": shards, "loader": loader}
"""By what the names of their tensors begin with."""
