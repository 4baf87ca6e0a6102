"""The data of OSAM: two texts that repeat themselves, and where the published program begins its training windows.

The texts have the structure that the published program trains on, in words of our own. ``periodic:`` is one sentence of
31 characters, 20,000 times: 620,000 characters, 17 distinct. ``needle:`` is a phrase of 19 characters, 8,000 times;
whenever phrases of 240 characters or more have passed since the last one, a needle of 15 characters follows: 161,225
characters, 13 distinct, 615 needles, the first at offset 247, then one every 262.

They show quickly whether anything is learned at all. They do not test memory: the needle never changes, and a model
that has seen two of them knows it by its weights. Nor is their held-out part new text: it repeats the training part.
Tasks that need a memory are in `runs/probe_tasks.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ouroboros.errors import check

SENTENCE = b"round snakes, they're all one. "
REPETITIONS = 20_000
PHRASE = b"tall green grasses "
PHRASES = 8_000
NEEDLE = b" hidden dragon "
NEEDLE_AFTER = 240
"""Characters of phrases between two needles, at least."""


def periodic_text() -> bytes:
    """The text of the source ``periodic:``."""
    return SENTENCE * REPETITIONS


def needle_text() -> bytes:
    """The text of the source ``needle:``."""
    phrases = -(-NEEDLE_AFTER // len(PHRASE))
    periods, rest = divmod(PHRASES, phrases)
    return (PHRASE * phrases + NEEDLE) * periods + PHRASE * rest


def published_starts(tokens: int, sequence_length: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The published starts of training windows, a batch at a time, int64 (batch_size,), without end.

    A window is ``sequence_length + 1`` ids of a text of ``tokens``. Starts are drawn by a torch generator of their own,
    uniformly from 0 up to but not including ``tokens - sequence_length - 1``: windows overlap, there are no epochs, the
    last possible window is never drawn, and nothing is held out.

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
    import torch

    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(bound, (batch_size,), generator=generator).numpy() for _ in itertools.count())
