"""The published order of tokens; its numbers are golden."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ouroboros.errors import OuroborosError
from ouroboros.systems.crawler.data import published_batches


def test_spans_follow_one_another_across_shards_and_begin_again() -> None:
    shards = [np.arange(7), np.zeros(0, int), np.arange(7, 20)]
    options = {"global_tokens": 8, "sequence_length": 2, "grad_accum": 1, "world": 2}
    stream = np.tile(np.arange(20), 6)
    for rank in (0, 1):
        batches = itertools.islice(published_batches(shards, **options, rank=rank), 8)
        for number, (inputs, targets) in enumerate(batches):
            span = stream[10 * number + 5 * rank :][:5]
            assert inputs.tolist() == span[:4].reshape(2, 2).tolist()
            assert targets.tolist() == span[1:].reshape(2, 2).tolist()


def test_what_does_not_divide_is_refused() -> None:
    options = {"sequence_length": 4, "grad_accum": 1, "world": 2, "rank": 0}
    with pytest.raises(OuroborosError, match="12 tokens do not divide into rows of 4 .*; choose a multiple of 8"):
        published_batches([np.arange(9)], global_tokens=12, **options)
    with pytest.raises(OuroborosError, match="the shards are empty"):
        published_batches([np.zeros(0, int)], global_tokens=8, **options)
