"""Cheap baselines in bits per byte on the same held-out bytes: byte n-grams, bz2 and xz.

A language model that does not beat these has learned nothing that a compressor does not know.
"""

from __future__ import annotations

import bz2
import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from ouroboros.eval.score import with_text
from ouroboros.eval.stats import Record, ratio_interval, unit_edges, unit_size

ORDER = 4
"""Bytes of context of the n-gram that models are compared with."""
BOUNDARY = 256
"""Symbol in front of every document; a context may hold it, it is never predicted."""
SYMBOLS = 257
BZ2_BLOCK = 900_000
"""bz2 sees at most this many bytes at once, whatever came before."""


@dataclass(frozen=True, kw_only=True)
class Baseline(Record):
    """A baseline's score on held-out documents."""

    name: str
    bits_per_byte: float
    bytes: int
    """Held-out bytes."""
    train_bytes: int
    """Bytes it was given first."""
    stderr: float | None = None
    """Over units as in :func:`ouroboros.eval.score.score`; ``None`` for compressors, which code a text as a whole."""
    interval: tuple[float, float] | None = None
    detail: str = ""


class _Counts(NamedTuple):
    """Statistics of G n-grams of one length in C contexts (all symbols but the last), for binary search."""

    grams: np.ndarray
    """int64[G] codes, ascending."""
    counts: np.ndarray
    """int64[G] occurrences."""
    contexts: np.ndarray
    """int64[C] codes, ascending."""
    totals: np.ndarray
    """int64[C] occurrences."""
    types: np.ndarray
    """int64[C] distinct symbols seen after each."""


class NGram:
    """Interpolated byte n-gram model with Witten-Bell smoothing; order k sees the last k bytes.

    ``p_n(w | h) = (c(hw) + t(h) p_{n-1}(w | h')) / (c(h) + t(h))`` with ``c`` counts, ``t(h)`` the number of
    distinct bytes seen after ``h`` and ``h'`` the context without its oldest byte; a context never seen leaves
    ``p_{n-1}``, and ``p_0 = 1/256`` (Witten & Bell 1991, method C; Chen & Goodman 1998, eq. 9). Probabilities
    over the 256 bytes sum to one in every context.
    """

    def __init__(self, train: Iterable[bytes], order: int) -> None:
        """Count n-grams of length 1 to ``order + 1`` <= 7, whose codes fit an int64: 257**7 < 2**63."""
        self.order = order
        codes = _codes(train, order + 1)
        self.train_bytes = len(codes)
        grams, counts = np.unique(codes, return_counts=True)
        levels = []
        for length in range(order + 1, 0, -1) if len(codes) else ():
            # The shorter n-grams are the suffixes of the longer, so one long sort serves them all.
            grams, inverse = np.unique(grams % SYMBOLS**length, return_inverse=True)
            counts = np.bincount(inverse, weights=counts).astype(np.int64)
            contexts, first, types = np.unique(grams // SYMBOLS, return_index=True, return_counts=True)
            levels.append(_Counts(grams, counts, contexts, np.add.reduceat(counts, first), types))
        self._levels = levels[::-1]

    def nats(self, documents: Iterable[bytes]) -> np.ndarray:
        """Negative log-probability, float64[N], of every byte of the documents, each with a fresh context."""
        codes = _codes(documents, self.order + 1)
        p = np.full(len(codes), 1 / 256)
        for length, level in enumerate(self._levels, start=1):
            gram = codes % SYMBOLS**length
            where, seen = _find(level.contexts, gram // SYMBOLS)
            at, known = _find(level.grams, gram)
            hits, total, types = np.where(known, level.counts[at], 0), level.totals[where], level.types[where]
            p = np.where(seen, (hits + types * p) / (total + types), p)
        return -np.log(p)


def _codes(documents: Iterable[bytes], length: int) -> np.ndarray:
    """int64[N]: for each byte the base-257 number of the ``length`` symbols that end there, oldest first."""
    head = np.full(length - 1, BOUNDARY, dtype=np.int64)
    texts = (np.frombuffer(document, dtype=np.uint8).astype(np.int64) for document in documents)
    symbols = np.concatenate([np.zeros(0, dtype=np.int64), *(part for text in texts for part in (head, text))])
    size = max(0, len(symbols) - length + 1)
    codes = np.zeros(size, dtype=np.int64)
    for offset in range(length):
        codes = codes * SYMBOLS + symbols[offset : offset + size]
    return codes[codes % SYMBOLS != BOUNDARY]


def _find(table: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of ``codes`` in the ascending ``table``, and whether they are there."""
    at = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return at, table[at] == codes


def ngram(train: Iterable[bytes], documents: Sequence[bytes], order: int) -> Baseline:
    """The order-``order`` byte n-gram (that many bytes of context) trained on ``train``; see :class:`NGram`.

    Raises:
        OuroborosError: there is no held-out byte.
    """
    kept = with_text(documents)
    model = NGram(train, order)
    size = unit_size(list(map(len, kept)))
    unit_bytes = np.concatenate([np.diff(unit_edges(len(document), size)) for document in kept])
    unit_nats = np.add.reduceat(model.nats(kept), np.cumsum(unit_bytes) - unit_bytes)
    bits = ratio_interval(unit_nats / math.log(2), unit_bytes)
    return Baseline(
        name=f"order-{order} n-gram",
        bits_per_byte=bits.mean,
        bytes=int(unit_bytes.sum()),
        train_bytes=model.train_bytes,
        stderr=bits.stderr,
        interval=bits.bounds,
        detail=f"Witten-Bell, {order} bytes of context",
    )


def compressor(name: Literal["bz2", "xz"], train: bytes, documents: Sequence[bytes]) -> Baseline:
    """Conditional size of the held-out text given ``train``: ``8 (C(train + text) - C(train)) / len(text)``.

    ``xz`` is preset 9 extreme with a dictionary that holds everything. ``bz2`` sorts blocks of 900,000 bytes and knows
    nothing of earlier ones: the text is cut into pieces of a quarter block, and each is given what directly precedes it
    (the end of ``train``, then the text before the piece) for the rest of its block.

    Raises:
        OuroborosError: there is no held-out byte.
    """
    text = b"".join(with_text(documents))
    if name == "xz":
        coded = _added(_xz, train, text)
        detail = "xz -9e given the training text"
    else:
        joined, piece = train[-BZ2_BLOCK:] + text, BZ2_BLOCK // 4
        coded = 0
        for start in range(len(joined) - len(text), len(joined), piece):
            end = min(start + piece, len(joined))
            coded += _added(bz2.compress, joined[max(0, end - BZ2_BLOCK) : start], joined[start:end])
        detail = f"bz2 -9 given the {BZ2_BLOCK - piece:,} bytes before, all that its block can hold"
    bits = 8 * coded / len(text)
    return Baseline(name=name, bits_per_byte=bits, bytes=len(text), train_bytes=len(train), detail=detail)


def _added(compress: Callable[[bytes], bytes], before: bytes, text: bytes) -> int:
    # Both codecs release the interpreter lock, so the two sizes cost the time of one where there are two cores.
    with ThreadPoolExecutor(2) as pool:
        both, alone = pool.map(lambda data: len(compress(data)), (before + text, before))
    return both - alone


def _xz(data: bytes) -> bytes:
    size = max(1 << 26, 1 << (len(data) - 1).bit_length()) if data else 1 << 26
    # liblzma's dictionary ends at 1.5 GiB; a text beyond that is coded with the newest part in view.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(size, 3 << 29)}]
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters)


def compare_baselines(
    train: Sequence[bytes], seen: Sequence[bytes] | None, documents: Sequence[bytes], *, whole: str = "all"
) -> list[Baseline]:
    """All baselines given the training text that a model has seen and, where that is less, given all of it.

    Args:
        train: all training documents.
        seen: the part the model has seen, with repetitions left out; None means all of it. Names are marked ``(seen)``.
        documents: the held-out documents.
        whole: the mark of ``train``; of a streamed run it is the head of the text only.
    """
    given = [(whole, train)]
    if seen is not None and sum(map(len, seen)) < sum(map(len, train)):
        given.insert(0, ("seen", seen))
    found = []
    for label, texts in given:
        text = b"".join(texts)
        cheap = [ngram(texts, documents, ORDER), *(compressor(name, text, documents) for name in ("bz2", "xz"))]
        found += [replace(baseline, name=f"{baseline.name} ({label})") for baseline in cheap]
    return found
