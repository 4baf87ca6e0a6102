"""What published programs did to their data, for parity and for comparison; nothing here is used to train.

R-HRM: its text rule, filter, block cut and order of samples (last revision). What they cost is shown by
:func:`published_shares`: documents act by weight before filter and cut, so most short ones never reach the model.

OSAM: where its windows start (:func:`published_starts`). Windows are drawn at random and overlap, so that there are no
epochs; the last possible one is never drawn; and nothing is held out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ouroboros.config import FilterSpec
from ouroboros.data.filters import Filters
from ouroboros.errors import check

END_MARK = "\n<|endoftext|>\n"
"""What followed every text: three GPT-2 tokens (198, 50256, 198)."""
PUBLISHED_FILTERS = FilterSpec(max_characters=10_000, symbol_run=10, symbol_rule="ascii")
"""The published filter as a specification."""


def record_prose(record: Mapping[str, Any]) -> str:
    """The published text of a record: question and answer, ``text``, ``content``; else Python's repr of the record."""
    parts = []
    for question, answer in (("question", "answer"), ("query", "response")):
        if question in record and answer in record:
            parts.append(f"Q: {record[question]}\nA: {record[answer]}")
            break
    parts += [str(record[column]) for column in ("text", "content") if record.get(column)]
    return "\n".join(parts) if parts else str(dict(record))


def published_text(record: Mapping[str, Any]) -> str:
    """The published training string of a record: :func:`record_prose` and the end mark."""
    return record_prose(record) + END_MARK


def published_accepts(text: str) -> bool:
    """Whether the published filter accepts ``text`` (without the end mark)."""
    return Filters(PUBLISHED_FILTERS).reason(text) is None


def published_blocks(tokens: int, block: int) -> range:
    """The first token of each block cut from one document: 0, block, 2 block ... strictly below ``tokens - block``.

    Each block has ``block`` tokens, so ``ceil(tokens / block) - 1`` of them: documents of up to ``block`` tokens
    vanish, every other one loses 1 to ``block`` tokens at its end.
    """
    return range(0, max(tokens - block, 0), block)


def published_order(weights: Sequence[float], lengths: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """The published order of samples, without end: (source, row), rows from 0.

    One weighted draw of Python's random module per sample; a source that ends begins again; an empty one is drawn
    again.

    Raises:
        OuroborosError: every source is empty (the original would never return).
    """
    check(any(lengths), "published order: every source is empty")
    generator = random.Random(seed)  # the same numbers as the module's functions after random.seed(seed)
    rows = [itertools.cycle(range(length)) for length in lengths]
    while True:
        source = generator.choices(range(len(weights)), weights=weights)[0]
        if lengths[source]:
            yield source, next(rows[source])


def published_shares(weights: Sequence[float], acceptance: Sequence[float], blocks: Sequence[float]) -> list[float]:
    """The share of training tokens each source gets after filter and cut; sums to 1.

    Args:
        weights: of the draws, in any unit.
        acceptance: share of a source's documents that the filter accepts.
        blocks: mean number of :func:`published_blocks` of its accepted documents.

    Raises:
        OuroborosError: no source yields a block.
    """
    yields = [weight * kept * mean for weight, kept, mean in zip(weights, acceptance, blocks, strict=True)]
    check(sum(yields) > 0, "published shares: no source yields a block")
    return [value / sum(yields) for value in yields]


def published_starts(tokens: int, sequence_length: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The published starts of OSAM's training windows, a batch at a time, int64 (batch_size,), without end.

    A window is ``sequence_length + 1`` ids of a text of ``tokens``; starts are drawn by a torch generator of its own,
    uniformly from 0 up to but not including ``tokens - sequence_length - 1``.

    Raises:
        OuroborosError: a size below 1; a text too short for two windows.
    """
    check(sequence_length >= 1, f"published starts: sequence_length must be >= 1, got {sequence_length}")
    check(batch_size >= 1, f"published starts: batch_size must be >= 1, got {batch_size}")
    bound = tokens - sequence_length - 1
    check(
        bound >= 1,
        f"published starts: the text has {tokens} tokens; windows of {sequence_length} need at least"
        f" {sequence_length + 2}",
    )
    return _starts(bound, batch_size, seed)


def _starts(bound: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(bound, (batch_size,), generator=generator).numpy()
