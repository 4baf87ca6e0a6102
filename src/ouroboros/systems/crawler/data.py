"""The published order of training tokens: one stream over the shards, which begins again at its end.

Nothing here is used in training, where windows come in an order that each epoch shuffles, that is the same at any
number of processes and that skips no target (:mod:`ouroboros.data.loader`). With ``data.stream`` they come in the order
of the shards as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ouroboros.errors import check


def published_batches(
    shards: Sequence[np.ndarray], *, global_tokens: int, sequence_length: int, grad_accum: int, world: int, rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The published micro-batches of a process, without end: inputs and targets, int64 (rows, ``sequence_length``).

    Each micro-batch takes ``world * (n + 1)`` ids of the stream, n = ``global_tokens / (world * grad_accum)``. Process
    r has the r-th span of n + 1: its inputs are the first n, its targets the last n. Nothing is shuffled, and the
    target between two spans is never learned.

    Args:
        shards: the ids of each, in the order of their names.
        global_tokens: targets of a step.
        sequence_length: ids of a row.
        grad_accum: micro-batches of a step.
        world: processes.
        rank: this one.

    Raises:
        OuroborosError: sizes that do not divide; no ids.
    """
    size, rest = divmod(global_tokens, world * grad_accum)
    check(
        rest == 0 and size % sequence_length == 0 and size > 0,
        f"published batches: {global_tokens} tokens do not divide into rows of {sequence_length} for {world} processes"
        f" and {grad_accum} micro-batches; choose a multiple of {sequence_length * world * grad_accum}",
    )
    check(any(len(shard) for shard in shards), "published batches: the shards are empty")
    return _batches(shards, size, sequence_length, world, rank)


def _batches(
    shards: Sequence[np.ndarray], size: int, sequence_length: int, world: int, rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    stream, ahead = itertools.cycle(shards), np.zeros(0, np.int64)
    span = size + 1
    while True:
        while len(ahead) < world * span:
            ahead = np.concatenate([ahead, next(stream).astype(np.int64)])
        ids, ahead = ahead[rank * span : (rank + 1) * span], ahead[world * span :]
        yield ids[:-1].reshape(-1, sequence_length), ids[1:].reshape(-1, sequence_length)
