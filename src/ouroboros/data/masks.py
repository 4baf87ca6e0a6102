"""Which tokens training learns to write, with ``data.loss`` = ``answers``.

A token of an answer is one that has a byte in it, or the end-of-text token behind an answer that ends the text. Windows
carry this within their ids: an id that is read and not learned is given as its complement ``~id``, which is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import check

IGNORED = -100
"""The target of a position without loss, as torch has it."""


class Masks:
    """Finds the tokens of answers; refuses a tokenizer whose ids have no bytes of their own."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._bytes = tokenizer, tokenizer.token_bytes()

    def mask(
        self, ids: np.ndarray, document: bytes, answers: Sequence[tuple[int, int]] | None, name: str
    ) -> np.ndarray:
        """Whether each of the ids (n,) of a document is learned, bool (n,); tokens without its bytes are refused.

        ``answers`` are bytes from and to; None learns all of the document. ``name`` is its name, for messages.
        """
        if answers is None:
            return np.ones(len(ids), dtype=bool)
        sizes = self._bytes[ids]
        if self._tokenizer.unknown_id is not None:
            # One token a character: those that the tokenizer does not know have their own lengths.
            points = np.frombuffer(document.decode().encode("utf-32-le"), dtype="<u4")
            sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF).astype(np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        check(
            not len(ends) or ends[-1] == len(document),
            f"{name}: the tokenizer changes this text, so data.loss 'answers' cannot tell the tokens of its answer;"
            " use a byte or byte-level BPE tokenizer",
        )
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in answers:
            mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, end, side="left")] = True
        return mask


def ends_answered(document: bytes, answers: Sequence[tuple[int, int]] | None) -> bool:
    """Whether the end of a document is learned."""
    return answers is None or (bool(answers) and answers[-1][1] == len(document))


def hide(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Ids as windows have them: the complement of those that are not learned."""
    return np.where(mask, ids, ~ids.astype(np.int64))


def shown(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of windows (B, T + 1), and their targets (B, T), :data:`IGNORED` where nothing is learned."""
    ids = np.where(windows < 0, ~windows, windows)
    return ids, np.where(windows < 0, IGNORED, windows)[:, 1:]


def micro_divisors(windows: np.ndarray, count: int, mean: Callable[[float], float]) -> tuple[np.ndarray, list[float]]:
    """A process's windows of a step in ``count`` parts, and what the mean loss of each part is divided by to add up to
    the mean over the tokens that are learned, of all processes.

    Args:
        windows: (B, T + 1), B a multiple of ``count``.
        count: parts.
        mean: of a number over all processes.

    Returns:
        The windows, in which a part that learns nothing is given one token, which then counts for nothing; and the
        divisors.
    """
    parts = np.split(windows.copy(), count)
    learned = [int((part[:, 1:] >= 0).sum()) for part in parts]
    whole = mean(sum(learned))
    for part, here in zip(parts, learned, strict=True):
        if not here:  # a mean over no token is no number
            part[0, -1] = ~part[0, -1]
    return np.concatenate(parts), [whole / here if here else math.inf for here in learned]
