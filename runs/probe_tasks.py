"""Tasks that only a memory solves: random content in every sequence, an answer that follows from what came before.

Each probe is a specification with :meth:`~Recall.sample`, which gives ids and labels for a model of ``vocab_size`` ids.
A label is the id itself at an answer and -100 elsewhere, unshifted, as ``OuroborosForCausalLM(ids, labels=labels)``
takes them: the answer at position t is predicted at t - 1, where the question stands. Nothing can be learned by
heart, because keys, values and places are drawn anew for every sequence, all from one explicit seed.

What a model without the memory in question can reach is part of each probe. ``chance`` is the accuracy of a model that
knows which ids are answers and nothing of the sequence; a mean loss of ``-ln(chance)`` nats belongs to it. ``unbound``
is the accuracy of one that remembers which answers are still to come, but not which of them belongs to the question. A
probe shows memory only above both.

- :class:`Recall`, multi-query associative recall (MQAR; Arora et al. 2023, "Zoology"): ``k1 v1 k2 v2 ...``, then each
  queried key followed by its value, in random order, between random tokens. In the paper distances follow a power law;
  here every arrangement of queries is as likely as any other.
- :class:`Copy`: a random string, a separator, the string again.
- :class:`Needle`: one key and its value anywhere among random tokens; the key is asked for at the end.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ouroboros.errors import check

IGNORED = -100
"""Label of a position that is no answer."""

Seed = int | Sequence[int]
"""Of one batch: a number >= 0 or several, for example ``(seed, step)``."""


class Batch(NamedTuple):
    """Sequences of one probe."""

    inputs: np.ndarray
    """Ids, int64 (B, T)."""
    labels: np.ndarray
    """The id at each answer, :data:`IGNORED` elsewhere, int64 (B, T)."""


@dataclass(frozen=True, kw_only=True)
class _OfValues:
    """A probe whose answers are values, the first ids."""

    values: int = 64

    @property
    def chance(self) -> float:
        """Accuracy of guessing any value."""
        return 1 / self.values

    def _guessing_among(self, candidates: int) -> float:
        """Accuracy of guessing one of so many values, one of which is right and the others may equal it."""
        return 1 / candidates + (1 - 1 / candidates) / self.values


@dataclass(frozen=True, kw_only=True)
class Recall(_OfValues):
    """Multi-query associative recall. Ids: ``values`` values, which are also what stands between queries, then keys.

    Keys of a sequence are distinct, each asked for at most once; values are drawn independently, so they may repeat.

    Raises:
        OuroborosError: fewer keys than pairs, more queries than pairs, a length too short for both, fewer than two
            values.
    """

    pairs: int = 8
    queries: int = 8
    length: int = 64
    """T: two tokens for each pair and each query, the rest random values between the queries."""
    keys: int = 64

    def __post_init__(self) -> None:
        check(self.pairs >= 1, f"recall: pairs must be >= 1, got {self.pairs}")
        check(
            self.pairs <= self.keys,
            f"recall: pairs must be <= keys ({self.keys}), since the keys of a sequence are distinct; got {self.pairs}",
        )
        check(
            1 <= self.queries <= self.pairs,
            f"recall: queries must be from 1 to pairs ({self.pairs}), since a repeated query would be answered by the"
            f" first one; got {self.queries}",
        )
        _check_values("recall", self.values)
        least = 2 * (self.pairs + self.queries)
        check(
            self.length >= least,
            f"recall: {self.pairs} pairs and {self.queries} queries need a length of {least}, got {self.length}",
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.values + self.keys

    @property
    def unbound(self) -> float:
        """Accuracy of guessing among the values of the pairs whose value has not been given yet."""
        left = range(self.pairs, self.pairs - self.queries, -1)
        return float(np.mean(list(map(self._guessing_among, left))))

    def sample(self, batch_size: int, seed: Seed) -> Batch:
        """A batch of ``batch_size`` sequences; equal for equal seeds.

        Raises:
            OuroborosError: a batch size below 1, a negative seed.
        """
        rng = _generator("recall", batch_size, seed)
        rows = np.arange(batch_size)[:, None]
        keys = self.values + _distinct(rng, batch_size, self.keys, self.pairs)
        values = rng.integers(self.values, size=(batch_size, self.pairs))
        inputs = rng.integers(self.values, size=(batch_size, self.length))
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        # The rest is a row of units: queries of two tokens and random tokens, in any order.
        units = self.length - 2 * self.pairs - self.queries
        order = np.sort(_distinct(rng, batch_size, units, self.queries), axis=1)
        places = 2 * self.pairs + order + np.arange(self.queries)
        asked = _distinct(rng, batch_size, self.pairs, self.queries)
        inputs[rows, places], inputs[rows, places + 1] = keys[rows, asked], values[rows, asked]
        return _labelled(inputs, places + 1)


@dataclass(frozen=True, kw_only=True)
class Copy(_OfValues):
    """Write a random string again. Ids: ``values`` values, then the separator; T is ``2 span + 1``.

    Every token of the second string is an answer.

    Raises:
        OuroborosError: an empty string, fewer than two values.
    """

    span: int = 32
    """Tokens of the string; also how far back each answer is, less one."""

    def __post_init__(self) -> None:
        check(self.span >= 1, f"copy: span must be >= 1, got {self.span}")
        _check_values("copy", self.values)

    @property
    def length(self) -> int:
        """T."""
        return 2 * self.span + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.values + 1

    @property
    def unbound(self) -> float:
        """Accuracy of guessing among the tokens of the string that have not been written again yet."""
        return float(np.mean(list(map(self._guessing_among, range(1, self.span + 1)))))

    def sample(self, batch_size: int, seed: Seed) -> Batch:
        """A batch of ``batch_size`` sequences; equal for equal seeds.

        Raises:
            OuroborosError: a batch size below 1, a negative seed.
        """
        rng = _generator("copy", batch_size, seed)
        text = rng.integers(self.values, size=(batch_size, self.span))
        separator = np.full((batch_size, 1), self.values)
        inputs = np.concatenate([text, separator, text], axis=1)
        return _labelled(inputs, np.arange(self.span + 1, self.length)[None])


@dataclass(frozen=True, kw_only=True)
class Needle(_OfValues):
    """One key and its value among random values, asked for at the end. Ids: ``values`` values, then ``keys`` keys.

    With a single key there is nothing to confuse it with: the probe asks how far back a memory reaches, not how many
    pairs it keeps apart.

    Raises:
        OuroborosError: no key, fewer than two values, a length or distance that leaves no place for the pair.
    """

    length: int = 256
    """T: the question is at T - 2, its answer at T - 1."""
    distance: int | None = None
    """How many tokens the answer is after its value, from 2 to T - 2; None draws the place of the pair, uniformly."""
    keys: int = 64

    def __post_init__(self) -> None:
        check(self.length >= 4, f"needle: length must be >= 4 (a pair, the question, its answer), got {self.length}")
        check(self.keys >= 1, f"needle: keys must be >= 1, got {self.keys}")
        _check_values("needle", self.values)
        check(
            self.distance is None or 2 <= self.distance <= self.length - 2,
            f"needle: distance must be from 2 to length - 2 ({self.length - 2}), got {self.distance}",
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.values + self.keys

    @property
    def unbound(self) -> float:
        """Accuracy of guessing one of the values before the question, all of which look alike."""
        return self._guessing_among(self.length - 3)

    def sample(self, batch_size: int, seed: Seed) -> Batch:
        """A batch of ``batch_size`` sequences; equal for equal seeds.

        Raises:
            OuroborosError: a batch size below 1, a negative seed.
        """
        rng = _generator("needle", batch_size, seed)
        rows = np.arange(batch_size)
        inputs = rng.integers(self.values, size=(batch_size, self.length))
        keys = self.values + rng.integers(self.keys, size=batch_size)
        places = rng.integers(self.length - 3, size=batch_size)
        if self.distance is not None:
            places[:] = self.length - 2 - self.distance
        inputs[rows, places], inputs[:, -2] = keys, keys
        inputs[:, -1] = inputs[rows, places + 1]
        return _labelled(inputs, np.array([[self.length - 1]]))


Probe = Recall | Copy | Needle
"""A task."""


def _check_values(name: str, values: int) -> None:
    check(values >= 2, f"{name}: values must be >= 2, else there is nothing to remember; got {values}")


def _generator(name: str, batch_size: int, seed: Seed) -> np.random.Generator:
    check(batch_size >= 1, f"{name}: batch_size must be >= 1, got {batch_size}")
    numbers = [seed] if isinstance(seed, int) else list(seed)
    check(min(numbers, default=-1) >= 0, f"{name}: seed must be a number >= 0 or several, got {seed}")
    return np.random.default_rng(seed)


def _distinct(rng: np.random.Generator, rows: int, bound: int, count: int) -> np.ndarray:
    """``count`` distinct numbers below ``bound`` in random order for each row, int64 (rows, count)."""
    return rng.permuted(np.tile(np.arange(bound), (rows, 1)), axis=1)[:, :count]


def _labelled(inputs: np.ndarray, answers: np.ndarray) -> Batch:
    """The batch with labels at the positions ``answers``, (B, n) or (1, n)."""
    labels = np.full_like(inputs, IGNORED)
    np.put_along_axis(labels, answers, np.take_along_axis(inputs, answers, axis=1), axis=1)
    return Batch(inputs, labels)
