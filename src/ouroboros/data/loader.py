"""Windows of tokens in a fixed, resumable order.

The order is a function of (seed, sources, weights, sequence length) alone; batch size, number of processes and workers
only group it. Sample number ``i`` = 0, 1, 2, ... is made in three steps.

1. *Windows.* The training ids of source ``s`` are one stream of ``n`` ids (documents joined, each after its
   end-of-text id). Window ``w`` is ids ``w*T`` to ``w*T + T`` inclusive: T inputs and, shifted by one, T targets.
   There are ``W = (n - 1) // T`` windows; the ids after the last one are dropped and counted.
2. *Mixing.* With weights normalised to sum 1 and ``c[s]`` samples drawn before from source ``s``, sample ``i`` comes
   from the source that minimises ``(c[s] + 1 - d) / weight[s]`` among those with ``weight[s] * (i + 1) - c[s] >= d``,
   where ``d = 1 / (2 S - 2)`` for S sources, ties to the lower number (Tijdeman, "The chairman assignment problem",
   1980). After any number of samples each source is within ``1 - d`` samples of its share; picking the largest
   deficit instead can miss it by more than one.
3. *Order in a source.* Draw number ``c`` of source ``s`` is position ``c % W`` of epoch ``e = c // W``. The epoch's
   order sorts the windows by ``mix(k + (w + 1) * 0x9E3779B97F4A7C15 mod 2**64)`` with SplitMix64's finaliser ``mix``
   (Steele et al. 2014) and ``k`` the first eight bytes, little-endian, of sha256 of the text ``"<seed>:<s>:<e>"``.
   Hence each epoch visits each window once, and no library's random generator can change the order.

The state is the number of samples drawn and ``c``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError

logger = logging.getLogger(__name__)

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
    """The source of the next sample after ``counts`` samples of each. See the module's step 2.

    Args:
        weights: positive, sum 1.
        counts: samples drawn from each source so far.
    """
    if len(weights) == 1:
        return 0
    slack = 1 / (2 * len(weights) - 2)
    drawn = sum(counts) + 1
    due = [s for s, w in enumerate(weights) if w * drawn - counts[s] >= slack - _TOLERANCE]
    return min(due, key=lambda s: ((counts[s] + 1 - slack) / weights[s], s))


class WindowLoader:
    """Batches of windows over prepared data; its position is saved and restored exactly.

    Attributes:
        windows: windows of each source in one epoch.
        dropped_tokens: ids of each source that are never a target (shorter than one window, at the end).
        samples: samples drawn so far, over all processes.
    """

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
        """Open the training split.

        Args:
            prepared: the data.
            batch_size: samples of a global batch, over all processes.
            sequence_length: T, inputs of a window.
            seed: of the order.
            rank: this process.
            world_size: processes; each takes ``batch_size // world_size`` consecutive samples of a global batch.

        Raises:
            OuroborosError: sizes that do not fit; a source with less than one window.
        """
        if sequence_length < 1:
            raise OuroborosError(f"data.sequence_length must be >= 1, got {sequence_length}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise OuroborosError(f"rank {rank} of {world_size} processes: need 0 <= rank < world_size")
        if batch_size < 1 or batch_size % world_size:
            raise OuroborosError(
                f"train.batch_size ({batch_size}) must be a positive multiple of the number of processes ({world_size})"
            )
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.rank, self.world_size = rank, world_size
        self.fingerprint = prepared.fingerprint
        self._names = [ref.text for ref in prepared.sources]
        self._streams = [prepared.train_tokens(index) for index in range(len(self._names))]
        self._weights = [weight / sum(prepared.weights) for weight in prepared.weights]
        for name, stream in zip(self._names, self._streams, strict=True):
            _check_length(name, len(stream), sequence_length)
        self.windows = [(len(stream) - 1) // sequence_length for stream in self._streams]
        self.dropped_tokens = [(len(stream) - 1) % sequence_length for stream in self._streams]
        if any(self.dropped_tokens):
            logger.info("data: %d training tokens do not fill a window and are dropped", sum(self.dropped_tokens))
        self._counts = [0] * len(self._streams)
        self._orders: list[tuple[int, np.ndarray] | None] = [None] * len(self._streams)

    @property
    def samples(self) -> int:
        """Samples drawn so far, over all processes."""
        return sum(self._counts)

    @property
    def counts(self) -> list[int]:
        """Samples drawn so far from each source."""
        return list(self._counts)

    @property
    def epochs(self) -> list[float]:
        """How often each source has been read."""
        return [count / windows for count, windows in zip(self._counts, self.windows, strict=True)]

    def next_batch(self) -> np.ndarray:
        """This process's part of the next global batch, int64 (batch_size // world_size, T + 1)."""
        draws, self._counts = self._draw()
        share = self.batch_size // self.world_size
        return self._gather(draws[self.rank * share : (self.rank + 1) * share])

    def peek_hash(self) -> str:
        """sha256 (hex) of the next global batch (little-endian int64) without advancing; equal on all processes."""
        return hashlib.sha256(self._gather(self._draw()[0]).astype("<i8").tobytes()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position and what it belongs to, as JSON values."""
        return {"samples": self.samples, "counts": self.counts, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            OuroborosError: the state is of another seed, window length, mixture or data; names which.
        """
        missing = {"samples", "counts", *self._identity()} - state.keys()
        if missing:
            raise OuroborosError(f"data position: lacks {', '.join(sorted(missing))}")
        for name, value in self._identity().items():
            if state[name] != value:
                raise OuroborosError(f"data position: was saved with {name} {state[name]!r}, not {value!r}")
        counts = [int(count) for count in state["counts"]]
        if len(counts) != len(self._streams) or min(counts) < 0 or sum(counts) != state["samples"]:
            raise OuroborosError(f"data position: counts {counts} do not fit samples {state['samples']}")
        self._counts = counts

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "weights": self._weights,
            "fingerprint": self.fingerprint,
        }

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
        size = self.sequence_length
        batch = np.empty((len(draws), size + 1), dtype=np.int64)
        for row, (source, draw) in enumerate(draws):
            epoch, position = divmod(draw, self.windows[source])
            start = int(self._order(source, epoch)[position]) * size
            batch[row] = self._streams[source][start : start + size + 1]
        return batch

    def _order(self, source: int, epoch: int) -> np.ndarray:
        cached = self._orders[source]
        if cached is None or cached[0] != epoch:
            cached = (epoch, window_order(self.seed, source, epoch, self.windows[source]))
            self._orders[source] = cached
        return cached[1]


def seen_text(prepared: PreparedData, position: Mapping[str, Any]) -> list[bytes] | None:
    """The training text that a run has seen, each window once, in the order of the text; None when it is all of it.

    Args:
        prepared: the run's data.
        position: :meth:`WindowLoader.state_dict` of the run.
    """
    length, seed = position["sequence_length"], position["seed"]
    streams = [prepared.train_tokens(index) for index in range(len(prepared.sources))]
    totals = [(len(stream) - 1) // length for stream in streams]
    counts = position["counts"]
    if all(count >= total for count, total in zip(counts, totals, strict=True)):
        return None
    found = []
    for source, (stream, total, count) in enumerate(zip(streams, totals, counts, strict=True)):
        windows = np.sort(window_order(seed, source, 0, total)[:count])
        found += [prepared.tokenizer.decode(stream[at * length : (at + 1) * length]) for at in windows.tolist()]
    return found


def _check_length(name: str, tokens: int, sequence_length: int) -> None:
    if tokens < sequence_length + 1:
        raise OuroborosError(
            f"source {name!r}: its training part has {tokens} tokens, but one window needs {sequence_length + 1};"
            f" set data.sequence_length to at most {tokens - 1}, or use a longer text"
        )
