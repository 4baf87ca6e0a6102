"""Checks of the challenge's data: shards, and the published order of their tokens."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ouroboros.data.token_shards import read_shard, write_shards
from ouroboros.systems.crawler.data import published_batches

Tensors = dict[str, Tensor]


def shard_numbers(tensors: Tensors) -> list[int]:
    found = (re.fullmatch(r"shard(\d+)\.tokens", name) for name in tensors)
    return sorted(int(match[1]) for match in found if match)


def shards(case: dict[str, Any], tensors: Tensors) -> None:
    """``shard*``: files have the recorded first bytes and give their ids back."""
    numbers = shard_numbers(tensors)
    assert [len(tensors[f"shard{number}.tokens"]) for number in numbers] == case["loader"]["shard_lengths"]
    for number in numbers:
        ids, head = (tensors[f"shard{number}.{name}"].numpy() for name in ("tokens", "head_bytes"))
        with tempfile.TemporaryDirectory() as folder:
            (file,) = write_shards(Path(folder), "x", [ids])
            data, found = file.read_bytes(), np.array(read_shard(file))
        assert data[: len(head)] == head.tobytes() and not any(data[len(head) : 1024])
        assert len(data) == 1024 + 2 * len(ids) and np.array_equal(found, ids)


def loader(case: dict[str, Any], tensors: Tensors) -> None:
    """``loader.*``: the batches of every process."""
    settings = case["loader"]
    stream = [tensors[f"shard{number}.tokens"].numpy() for number in shard_numbers(tensors)]
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
            for kind, rows in (("x", inputs), ("y", targets)):
                assert np.array_equal(rows, tensors[f"{name}.{kind}"].numpy()), name
            checked += 1
    assert checked == sum(name.startswith("loader.") and name.endswith(".x") for name in tensors) > 0


GROUPS: dict[str, Callable[[dict[str, Any], Tensors], None]] = {"shard": shards, "loader": loader}
"""The check of each group of tensors, by the beginning of their names."""
