"""Windows of tokens in a fixed, resumable order.

The order is a function of (seed, sources, weights, sequence length) alone; batch size, number of processes and workers
only group it. Sample number ``i`` = 0, 1, 2, ... is made in three steps.

1. *Windows.* The training ids of source ``s`` are one stream of ``n`` ids (documents joined, each after its
   end-of-text id). Window ``w`` is ids ``w*T`` to ``w*T + T`` inclusive: T inputs and, shifted by one, T targets.
   There are ``W = ceil((n - 1) / T)`` windows; the last ends with the stream and so overlaps the one before it where
   T does not divide ``n - 1``. Hence every id but the first is a target in every epoch.
2. *Mixing.* With weights normalised to sum 1 and ``c[s]`` samples drawn before from source ``s``, sample ``i`` comes
   from the source that minimises ``(c[s] + 1 - d) / weight[s]`` among those with ``weight[s] * (i + 1) - c[s] >= d``,
   where ``d = 1 / (2 S - 2)`` for S sources, ties to the lower number (Tijdeman, "The chairman assignment problem",
   1980). After any number of samples each source is within ``1 - d`` samples of its share; picking the largest
   deficit instead can miss it by more than one.
3. *Order in a source.* Draw number ``c`` of source ``s`` is position ``c % W`` of epoch ``e = c // W``. The epoch's
   order sorts the windows by ``mix(k + (w + 1) * 0x9E3779B97F4A7C15 mod 2**64)`` with SplitMix64's finaliser ``mix``
   (Steele et al. 2014) and ``k`` the first eight bytes, little-endian, of sha256 of the text ``"<seed>:<s>:<e>"``.
   Hence each epoch visits each window once, and no library's random generator can change the order.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ouroboros.data.masks import hide
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError, check

_GOLDEN = 0x9E3779B97F4A7C15
_TOLERANCE = 1e-9
"""Rounding slack of the mixing rule; at least one source always qualifies in exact arithmetic."""


def window_order(seed: int, source: int, epoch: int, windows: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..windows-1, int64 (windows,). See the module's step 3."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{source}:{epoch}".encode()).digest()[:8], "little")
    z = np.arange(1, windows + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def choose_source(weights: Sequence[float], counts: Sequence[int]) -> int:
    """The source of the next sample after ``counts`` samples of each; ``weights`` sum to 1. See the module's step 2."""
    if len(weights) == 1:
        return 0
    slack = 1 / (2 * len(weights) - 2)
    drawn = sum(counts) + 1
    due = [s for s, w in enumerate(weights) if w * drawn - counts[s] >= slack - _TOLERANCE]
    return min(due, key=lambda s: ((counts[s] + 1 - slack) / weights[s], s))


class Loader(abc.ABC):
    """Batches of windows, mixed by weight; what loaders of stored and of streamed text share."""

    def __init__(
        self,
        prepared: PreparedData,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open the training split, with windows of ``sequence_length`` (T) inputs.

        Each of ``world_size`` processes takes ``batch_size // world_size`` consecutive samples of a global batch. Sizes
        that do not fit are refused, and so is a stored source with less than one window.
        """
        check(sequence_length >= 1, f"data.sequence_length must be >= 1, got {sequence_length}")
        check(
            batch_size >= 1 and batch_size % world_size == 0,
            f"train.batch_size ({batch_size}) must be a positive multiple of the number of processes ({world_size})",
        )
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.rank, self.world_size = rank, world_size
        self.names = [ref.text for ref in prepared.sources]
        self._weights = [weight / sum(prepared.weights) for weight in prepared.weights]
        self._counts = [0] * len(self.names)
        self._open(prepared)

    @abc.abstractmethod
    def _open(self, prepared: PreparedData) -> None:
        """Get ready to give the first window."""

    def next_batch(self) -> np.ndarray:
        """This process's part of the next global batch, int64 (batch_size // world_size, T + 1).

        With ``data.loss`` = ``answers`` ids that are not learned are hidden: see :mod:`ouroboros.data.masks`. If a
        source that is streamed cannot be read on, the position stays.
        """
        draws, counts = self._draw()
        share = self.batch_size // self.world_size
        batch = self._gather(draws[self.rank * share :][:share])
        self._advance(counts)
        return batch

    def peek_hash(self) -> str:
        """sha256 (hex) of the next global batch (little-endian int64) without advancing; equal on all processes."""
        return hashlib.sha256(self._gather(self._draw()[0]).astype("<i8").tobytes()).hexdigest()

    def upcoming_hash(self) -> str | None:
        """The same; None where a source cannot be read on, which ends a run at its next step."""
        try:
            return self.peek_hash()
        except OuroborosError:
            return None

    def state_dict(self) -> dict[str, Any]:
        """The position and what it belongs to, as JSON values."""
        return {"samples": sum(self._counts), "counts": list(self._counts), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; one of another seed, window length, mixture or data is refused by name."""
        missing = sorted({"samples", "counts", *self._identity()} - state.keys())
        check(not missing, f"data position: lacks {', '.join(missing)}")
        for name, value in self._identity().items():
            check(state[name] == value, f"data position: was saved with {name} {state[name]!r}, not {value!r}")
        counts = [int(count) for count in state["counts"]]
        fits = len(counts) == len(self.names) and min(counts) >= 0 and sum(counts) == state["samples"]
        check(fits, f"data position: counts {counts} do not fit samples {state['samples']}")
        self._counts = counts

    def _identity(self) -> dict[str, Any]:
        """What a position belongs to, as JSON values."""
        return {"seed": self.seed, "sequence_length": self.sequence_length, "weights": self._weights}

    def _draw(self) -> tuple[list[tuple[int, int]], list[int]]:
        """The next global batch as (source, draw number in it), and the counts after it."""
        counts = list(self._counts)
        draws = []
        for _ in range(self.batch_size):
            source = choose_source(self._weights, counts)
            draws.append((source, counts[source]))
            counts[source] += 1
        return draws, counts

    def _gather(self, draws: list[tuple[int, int]]) -> np.ndarray:
        """The windows of some draws, int64 (len(draws), T + 1)."""
        return np.array([self._window(source, draw) for source, draw in draws], dtype=np.int64)

    @abc.abstractmethod
    def _window(self, source: int, draw: int) -> np.ndarray:
        """Draw number ``draw`` of a source, (T + 1,)."""

    def _advance(self, counts: list[int]) -> None:
        """Go to the position at which ``counts`` samples of each source have been drawn."""
        self._counts = counts


class WindowLoader(Loader):
    """Batches of windows over prepared data; its position is saved and restored exactly."""

    def _open(self, prepared: PreparedData) -> None:
        self.fingerprint = prepared.fingerprint
        self._streams = [prepared.tokens("train", index) for index in range(len(self.names))]
        for name, stream in zip(self.names, self._streams, strict=True):
            check(
                len(stream) > self.sequence_length,
                f"source {name!r}: its training part has {len(stream)} tokens, but one window needs"
                f" {self.sequence_length + 1}; set data.sequence_length to at most {len(stream) - 1}",
            )
        self._learned = [prepared.learned(index) for index in range(len(self.names))]
        self.windows = [count_windows(len(stream), self.sequence_length) for stream in self._streams]
        self._orders = [(-1, np.zeros(0, dtype=np.int64))] * len(self._streams)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "fingerprint": self.fingerprint}

    def _window(self, source: int, draw: int) -> np.ndarray:
        epoch, position = divmod(draw, self.windows[source])
        stream = self._streams[source]
        if self._orders[source][0] != epoch:
            self._orders[source] = (epoch, window_order(self.seed, source, epoch, self.windows[source]))
        start = window_start(len(stream), self.sequence_length, int(self._orders[source][1][position]))
        here, learned = slice(start, start + self.sequence_length + 1), self._learned[source]
        return stream[here] if learned is None else hide(stream[here], learned[here])


def count_windows(tokens: int, sequence_length: int) -> int:
    """Windows of one epoch of a stream of ``tokens`` ids. See the module's step 1."""
    return -(-(tokens - 1) // sequence_length)


def window_start(tokens: int, sequence_length: int, window: int) -> int:
    """Where a window begins in a stream of ``tokens`` ids. See the module's step 1."""
    return min(window * sequence_length, tokens - 1 - sequence_length)


def seen_text(prepared: PreparedData, position: Mapping[str, Any]) -> list[bytes] | None:
    """The prepared training text that a run has seen, once, in the order of the text; None when it is all of it.

    Of a streamed run the prepared text is the head of each source; what the run read beyond it was not kept.
    ``position`` is :meth:`Loader.state_dict` of the run.
    """
    found: list[bytes] = []
    is_all = True
    for source, count in enumerate(position["counts"]):
        if prepared.spec.stream:
            documents, place = prepared.documents("train", source), position["positions"][source]
            before = place["counts"].get("kept", 0) - place["counts"].get("held out", 0)
            read = len(documents) if place["epoch"] else before + (place["offset"] > 0)
            is_all &= read >= len(documents)
            found += documents[:read]
            continue
        length, stream, end = position["sequence_length"], prepared.tokens("train", source), 0
        total = count_windows(len(stream), length)
        is_all &= count >= total
        for window in np.sort(window_order(position["seed"], source, 0, total)[:count]).tolist():
            start = window_start(len(stream), length, window)
            found.append(prepared.tokenizer.decode(stream[max(start, end) : start + length]))
            end = start + length
    return None if is_all else found
