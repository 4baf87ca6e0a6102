"""The data of OSAM: two texts that repeat themselves.

The texts have the structure that the published program trains on, in words of our own. ``periodic:`` is one sentence of
31 characters, 20,000 times: 620,000 characters, 17 distinct. ``needle:`` is a phrase of 19 characters, 8,000 times;
whenever phrases of 240 characters or more have passed since the last one, a needle of 15 characters follows: 161,225
characters, 13 distinct, 615 needles, the first at offset 247, then one every 262.

They show quickly whether anything is learned at all. They do not test memory: the needle never changes, and a model
that has seen two of them knows it by its weights. Nor is their held-out part new text: it repeats the training part.
Tasks that need a memory are in `runs/probe_tasks.py`.
"""

from __future__ import annotations

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
