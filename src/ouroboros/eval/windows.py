"""How a model is read to score sequences of ids: in windows, many at a time, with or without a cache.

A *procedure* is anything that reads sequences and says how probable each of their ids was; scores use one
(:mod:`ouroboros.eval.score`), and :mod:`ouroboros.eval.legality` says whether it is a fair one. The plain and the
sliding window are :class:`Windows`, with a cache :class:`Rolling`.

A sequence of T + 1 ids has T targets: target ``i`` is its id ``i + 1``, predicted at position ``i``, the id before it.
Shapes: B windows, T positions, M targets, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ouroboros.errors import check

BATCH_TOKENS = 8192
"""Input tokens of one batch when the caller gives no batch size."""
CPU_BATCH_TOKENS = 1024
"""The same on a processor, whose cache larger batches leave."""
BATCH_LOGITS = 2**25
"""Logits (tokens times vocabulary) of one batch when the caller gives no batch size: 128 MiB in float32."""
ROLLING_WINDOWS = 8
"""Windows of targets that :class:`Rolling` scores before it begins anew, so that a long text is many rows of a
batch."""

Predict = Callable[[Any, Tensor], Tensor]
"""``predict(model, input_ids[B, T]) -> log-probabilities[B, T, V]`` of the token after each position."""


class Scored(NamedTuple):
    """The distributions by which some consecutive targets of a sequence are scored."""

    sequence: int
    first: int
    """The first target."""
    log_probs: Tensor
    """(M, V), float32: of the targets ``first`` to ``first + M - 1``."""


Procedure = Callable[[Any, Sequence[Tensor]], Iterator[Scored]]
"""``procedure(model, sequences)``: the model, in evaluation mode and without gradients (:func:`evaluating`), reads
sequences of ids, each int64 (T + 1,)."""


class Span(NamedTuple):
    """One window over a sequence: inputs ``start:end``, scores the targets ``first:end``."""

    document: int
    start: int
    end: int
    first: int


def spans(tokens: int, window: int, stride: int, document: int = 0) -> Iterator[Span]:
    """The windows that score each of ``tokens`` targets exactly once.

    Window k reads inputs ``k * stride : k * stride + window`` and scores what the windows before it did not.
    With ``stride == window`` the windows are disjoint; with a smaller stride each target after the first window
    is predicted from at least ``window - stride + 1`` tokens.
    """
    start = scored = 0
    while scored < tokens:
        end = min(start + window, tokens)
        yield Span(document, start, end, scored)
        start, scored = start + stride, end


def log_probs(model: Any, input_ids: Tensor, keep: int = 0, **options: Any) -> Tensor:
    """Float32 log-softmax of ``model(input_ids=...).logits``: the usual :data:`Predict`.

    Args:
        model: ours, one of transformers', or any other that needs nothing but ids.
        input_ids: (B, T).
        keep: how many of the last positions are wanted; 0 means all. (B, T or ``keep``, V) is returned.
        options: of the call; by default nothing is kept in a cache.
    """
    if hasattr(getattr(model, "config", None), "use_cache"):
        options = {"use_cache": False, "logits_to_keep": keep} | options
    logits = model(input_ids=input_ids, **options).logits
    return torch.log_softmax(logits[:, -keep:].float(), dim=-1)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its previous mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter or buffer is, else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def rows(model: Any, length: int) -> int:
    """Windows of ``length`` tokens that are scored at a time."""
    vocabulary = getattr(model.config, "vocab_size", None) or 1
    tokens = CPU_BATCH_TOKENS if device_of(model).type == "cpu" else BATCH_TOKENS
    return max(1, min(tokens, BATCH_LOGITS // vocabulary) // length)


def check_windows(model: Any, window: int, stride: int) -> None:
    """Refuse windows that a model cannot read.

    Raises:
        OuroborosError: names the window or the stride, and the range.
    """
    check(window >= 1, f"window must be >= 1, got {window}")
    check(1 <= stride <= window, f"stride must be between 1 and the window ({window}), got {stride}")
    longest = getattr(model.config, "max_position_embeddings", None)
    check(
        longest is None or window <= longest,
        f"window {window} is longer than the model's context (max_position_embeddings {longest}): give {longest} or"
        " less",
    )


@dataclass(frozen=True)
class Windows:
    """Each window by itself: what is read, and so each score, depends on nothing outside the window."""

    window: int
    stride: int
    """Targets that each window after the first scores; equal to ``window`` they are disjoint."""
    batch_size: int | None = None
    """Windows per batch; None means as many as :func:`rows` says."""
    predict: Predict | None = None
    """Log-probabilities where they are not the softmax of the logits."""
    plan: Callable[[int, int, int, int], Iterator[Span]] = spans
    """Which windows score which targets: called as :func:`spans` is."""

    def __call__(self, model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
        """Score ``sequences``; in batches of like lengths, so not in their order."""
        for batch in self._batches(model, sequences):
            # Padding is on the right, where a causal model cannot see it from any scored position.
            parts = [sequences[sequence][start:end] for sequence, start, end, _ in batch]
            inputs = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device_of(model))
            skipped = min(first - start for _, start, _, first in batch)
            keep = inputs.shape[1] - skipped
            found = self.predict(model, inputs)[:, skipped:] if self.predict else log_probs(model, inputs, keep)
            for row, (sequence, start, end, first) in enumerate(batch):
                yield Scored(sequence, first, found[row, first - start - skipped : end - start - skipped])

    def _batches(self, model: Any, sequences: Sequence[Tensor]) -> Iterator[list[Span]]:
        """Windows of like length together, longest first, so that padding costs little; of these, windows together
        that score as many targets."""
        lengths = (len(sequence) - 1 for sequence in sequences)
        todo = [span for index, n in enumerate(lengths) for span in self.plan(n, self.window, self.stride, index)]
        todo.sort(key=lambda span: (span.start - span.end, span.first - span.start))
        at = 0
        while at < len(todo):
            count = self.batch_size or rows(model, todo[at].end - todo[at].start)
            yield todo[at : at + count]
            at += count


@dataclass(frozen=True)
class Rolling:
    """Sliding windows whose earlier tokens are remembered instead of read again: every token is read once.

    A text is divided into parts of ``ROLLING_WINDOWS * window`` targets, of which many are read side by side,
    ``stride`` tokens at a time, while the cache keeps the ``window - stride`` tokens before them. With keys and values
    of several layers this is not the same function as reading each window anew: what a cached entry says was computed
    when it saw tokens that lie before the window now. Memories of constant size forget nothing within a part. No target
    sees itself or anything behind it.
    """

    window: int
    stride: int
    batch_size: int | None = None
    """Parts per batch; None means as many as :func:`rows` says for the stride."""

    def __call__(self, model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
        """Score ``sequences``, many parts at a time.

        Raises:
            OuroborosError: the model cannot go on behind its window; says why.
        """
        from ouroboros.model.cache import check_rolls

        check_rolls(model)
        size, before = ROLLING_WINDOWS * self.window, self.window - self.stride
        parts = [
            Span(index, max(0, first - before), min(first + size, len(sequence) - 1), first)
            for index, sequence in enumerate(sequences)
            for first in range(0, len(sequence) - 1, size)
        ]
        parts.sort(key=lambda part: part.start - part.end)
        count = self.batch_size or rows(model, self.stride)
        for at in range(0, len(parts), count):
            yield from self._read(model, sequences, parts[at : at + count])

    def _read(self, model: Any, sequences: Sequence[Tensor], parts: Sequence[Span]) -> Iterator[Scored]:
        from transformers.cache_utils import DynamicCache

        from ouroboros.model.cache import keep_last

        padded = [sequences[sequence][start:end] for sequence, start, end, _ in parts]
        inputs = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device_of(model))
        store = DynamicCache(config=model.config)
        # The first piece makes the first window end where a piece does, so that it is read whole.
        ends = range(self.window % self.stride or self.stride, inputs.shape[1] + self.stride, self.stride)
        for begin, end in itertools.pairwise((0, *(min(end, inputs.shape[1]) for end in ends))):
            positions = torch.arange(begin, end, device=inputs.device)[None]
            options = {"use_cache": True, "past_key_values": store, "position_ids": positions}
            found = log_probs(model, inputs[:, begin:end], **options)
            keep_last(store, self.window - self.stride)
            for row, (sequence, start, stop, first) in enumerate(parts):
                here = slice(max(first - start, begin), min(stop - start, end))
                if here.start < here.stop:
                    yield Scored(sequence, start + here.start, found[row, here.start - begin : here.stop - begin])


def target_nats(found: Scored, sequences: Sequence[Tensor]) -> Tensor:
    """Negative log-probability, float64 (M,) on the CPU, of the targets that were scored."""
    count = len(found.log_probs)
    targets = sequences[found.sequence][found.first + 1 : found.first + 1 + count].to(found.log_probs.device)
    return -found.log_probs.gather(-1, targets[:, None])[:, 0].to("cpu", torch.float64)
