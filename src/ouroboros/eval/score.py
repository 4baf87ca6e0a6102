"""Bits per byte of the original text, every byte scored exactly once.

Each document is read as ``[eos] + tokens``; a token is predicted from the tokens before it in its document and window
(:mod:`ouroboros.eval.windows`). The bytes counted are those of the documents themselves. Log-probabilities are float32,
sums float64. A tokenizer of characters has one token for all that it does not know; each adds what it takes to say
which of the other Unicode characters it is (:func:`~ouroboros.data.characters.unknown_nats`).

The interval is that of a ratio estimator, ``sum(nats) / sum(bytes)``, over units
(:func:`~ouroboros.eval.stats.ratio_interval`). Units are whole documents where there are at least ten and none is more
than half of the text (:func:`~ouroboros.eval.stats.unit_size`); otherwise long documents are cut into pieces of 4 KiB
(:func:`~ouroboros.eval.stats.unit_edges`; a token counts in the piece where it begins). The interval says how the score
would vary over text like these units, and nothing about training seeds.

Shapes: B sequences, T positions. Nats are natural-log units, bits are nats / ln 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.data.characters import REPLACEMENT
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import Diverged, OuroborosError, check
from ouroboros.eval.stats import Record, ratio_interval, unit_edges, unit_size
from ouroboros.eval.windows import (
    Predict,
    Procedure,
    Windows,
    check_windows,
    device_of,
    evaluating,
    log_probs,
    rows,
    target_nats,
)

BOS_RULE = "each document is preceded by one end-of-text token, which is context and is not scored"


@dataclass(frozen=True, kw_only=True, eq=False)
class Score(Record):
    """A language model's score on a text, with everything needed to compare or repeat it."""

    bits_per_byte: float
    nats_per_token: float
    nats_per_token_stderr: float | None
    """Standard error of ``nats_per_token`` over units; ``None`` with fewer than two units."""
    bytes: int
    """Bytes of the documents that were scored: the sum of their lengths."""
    tokens: int
    unknown_tokens: int
    """Tokens that stand for a character which the tokenizer does not know."""
    nats: float
    stderr: float | None
    """Standard error of ``bits_per_byte`` over units; ``None`` with fewer than two units."""
    interval: tuple[float, float] | None
    """95 % Student interval of ``bits_per_byte``."""
    units: int
    unit: str
    """What a unit is."""
    documents: int
    empty_documents: int
    """Documents without a byte, skipped."""
    loops: int | None
    """Loop count; ``None`` when the model does not tell."""
    window: int
    stride: int
    reading: str
    """How the documents were read: ``windows``, or the name of another procedure, such as an adaptation."""
    bos_rule: str
    data_sha256: str
    model: str
    unit_nats: np.ndarray = field(repr=False)
    """float64[units]: nats of each unit, in document order."""
    unit_bytes: np.ndarray = field(repr=False)
    """int64[units]: bytes of each unit."""


def at_loops(model: Any, loops: int | None) -> Any:
    """``model``, or its view with another loop count.

    Raises:
        OuroborosError: a loop count was given for a model that has none.
    """
    if loops is None:
        return model
    check(hasattr(model, "with_loops"), f"loops={loops}: {type(model).__name__} has no loops; leave the loop count out")
    return model.with_loops(loops)


def data_hash(documents: Sequence[bytes]) -> str:
    """sha256 of the text: of the bytes of a single document, else of the documents' digests in order.

    Empty documents do not count. One whole file has the hash that ``sha256sum`` prints.
    """
    digests = [hashlib.sha256(document) for document in documents if document]
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def encode(tokenizer: TextTokenizer, document: bytes, name: str = "document") -> np.ndarray:
    """Token ids int64[T] of a document, checked to give back exactly its bytes, but for characters that the tokenizer
    says it does not know.

    Raises:
        OuroborosError: the tokenizer loses or changes bytes, so its tokens do not score the original text.
    """
    ids = np.asarray(tokenizer.encode(document), dtype=np.int64)
    expected, unknown = document, tokenizer.unknown(document)
    if unknown:
        expected = document.decode().translate(dict.fromkeys(map(ord, unknown), REPLACEMENT)).encode()
    check(
        bytes(tokenizer.decode(ids)) == expected,
        f"{name}: this tokenizer does not give back the same bytes (it is not lossless), so bits per byte of the"
        " original text cannot be measured; use a byte or byte-level BPE tokenizer",
    )
    return ids


def unknown_nats(tokenizer: TextTokenizer, ids: np.ndarray) -> np.ndarray:
    """What a score adds to the nats of each token, float64[T]: more than 0 where it stands for an unknown character."""
    if tokenizer.unknown_id is None:
        return np.zeros(len(ids))
    return np.where(ids == tokenizer.unknown_id, tokenizer.unknown_nats, 0.0)


def byte_table(tokenizer: TextTokenizer) -> np.ndarray | None:
    """Bytes of each token id, int64[V], or ``None`` for a tokenizer whose ids have no bytes of their own."""
    try:
        return np.asarray(tokenizer.token_bytes(), dtype=np.int64)
    except OuroborosError:
        return None


def first_bytes(document: bytes, size: int) -> bytes:
    """At most ``size`` bytes of a document, cut before a UTF-8 character rather than inside it."""
    end = size
    while max(0, size - 3) < end < len(document) and 0x80 <= document[end] < 0xC0:
        end -= 1
    return bytes(document[:end])


def with_text(documents: Sequence[bytes], max_bytes: int | None = None) -> list[bytes]:
    """The documents that are not empty, up to ``max_bytes`` in all, the last one cut.

    Raises:
        OuroborosError: there is no byte among them, or ``max_bytes`` < 1.
    """
    check(max_bytes is None or max_bytes >= 1, f"max_bytes must be >= 1, got {max_bytes}")
    kept = beginning(documents, sum(map(len, documents)) if max_bytes is None else max_bytes)
    check(bool(kept), "no data to score: every document is empty; give a text with at least one byte")
    return kept


def beginning(documents: Sequence[bytes], size: int) -> list[bytes]:
    """The first ``size`` bytes of the documents, the last one cut; without empty ones."""
    kept = []
    for document in documents:
        if size > 0 and (part := first_bytes(document, size)):
            kept.append(part)
        size -= len(document)
    return kept


def score(
    model: Any, tokenizer: TextTokenizer, documents: Sequence[bytes], *, loops: int | None = None, **options: Any
) -> Score:
    """Score ``documents`` at one loop count; None leaves the model as it is. The rest is as for :func:`score_loops`."""
    return score_loops(model, tokenizer, documents, [loops], **options)[0]


def score_loops(
    model: Any,
    tokenizer: TextTokenizer,
    documents: Sequence[bytes],
    loops: Sequence[int | None],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    model_name: str = "",
    amp: torch.dtype | None = None,
    predict: Predict | None = None,
    procedure: Procedure | None = None,
    reading: str = "windows",
) -> list[Score]:
    """Score ``documents`` in bits per byte at each loop count; the module's docstring says how.

    Args:
        model: ``model(input_ids=LongTensor[B, T]).logits`` is [B, T, V]; causal.
        tokenizer: the model's own; it must give back the bytes of each document.
        documents: the texts. Empty ones are skipped and counted.
        loops: loop counts, by ``model.with_loops``; None is the model as it is.
        window: input tokens of a window, at most ``model.config.max_position_embeddings``.
        stride: targets that each window after the first scores; None means ``window`` (disjoint windows).
        batch_size: windows per batch; None means as many as fit in about 1024 tokens (8192 on an accelerator)
            and 2**25 logits.
        max_bytes: score the first so many bytes only; the last document is cut, not inside a UTF-8 character.
        model_name: recorded as ``model``.
        amp: autocast type, for example ``torch.bfloat16``; None leaves autocast alone.
        predict: log-probabilities of a batch, for models that are not a plain softmax over logits.
        procedure: how the documents are read instead, for example a :class:`~ouroboros.eval.windows.Rolling` window or
            an adaptation (:mod:`ouroboros.eval.adapt`), made for the same window and stride.
        reading: recorded, says which procedure that is.

    Raises:
        OuroborosError: nothing to score, a window or stride out of range, a tokenizer that is not lossless or
            does not belong to the model, a loop count for a model without loops, scores that are not finite.
    """
    stride = window if stride is None else stride
    check_windows(model, window, stride)
    text = _prepare(tokenizer, documents, max_bytes)
    _check_vocabulary(model, max(int(sequence.max()) for sequence in text.sequences))
    procedure = Windows(window, stride, batch_size, predict) if procedure is None else procedure
    found = []
    for count in loops:
        view = at_loops(model, count)
        with evaluating(view), nullcontext() if amp is None else torch.autocast(device_of(model).type, dtype=amp):
            nats = _document_nats(view, text.sequences, procedure)
        used = count if count is not None else getattr(getattr(view, "schedule", None), "loops", None)
        found.append(_summary(text, nats, loops=used, window=window, stride=stride, reading=reading, model=model_name))
    return found


def next_token_nats(model: Any, ids: Tensor) -> Tensor:
    """The loss of every token of ``ids`` (B, T) but the first of each row, given those before it.

    Args:
        model: as for :func:`score_loops`; it is run in evaluation mode.
        ids: token ids without padding.

    Returns:
        Nats, float64 (B, T - 1) on the CPU.
    """
    found = []
    with evaluating(model):
        for part in ids.to(device_of(model)).split(rows(model, ids.shape[1])):
            found.append(-log_probs(model, part[:, :-1]).gather(-1, part[:, 1:, None])[..., 0])
    return torch.cat(found).to("cpu", torch.float64)


def _check_vocabulary(model: Any, largest: int) -> None:
    size = getattr(model.config, "vocab_size", None)
    check(
        not size or largest < size,
        f"token id {largest} does not fit the model's vocab_size {size}: this tokenizer is not the model's own",
    )


def _document_nats(model: Any, sequences: Sequence[Tensor], procedure: Procedure) -> np.ndarray:
    """Negative log-probability, float64[N], of every token of all documents, given as ``[eos] + tokens``."""
    nats = [np.full(len(sequence) - 1, np.nan) for sequence in sequences]
    for found in procedure(model, sequences):
        nats[found.sequence][found.first : found.first + len(found.log_probs)] = target_nats(found, sequences).numpy()
    for index, values in enumerate(nats):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise Diverged(
                f"document {index}: the score of token {bad[0]} is {values[bad[0]]}; the model gives NaN or"
                " probability 0"
            )
    return np.concatenate(nats)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text made ready to be scored, once for all loop counts."""

    sequences: list[Tensor]
    """``[eos] + tokens`` of each document, int64."""
    unknown: np.ndarray
    """float64[N], of all documents' tokens: see :func:`unknown_nats`."""
    unit: np.ndarray
    """int64[N]: the unit of each token, which is that where it begins."""
    unit_bytes: np.ndarray
    """int64[units]."""
    facts: dict[str, Any]
    """Fields of a :class:`Score` that the text alone decides."""


def _prepare(tokenizer: TextTokenizer, documents: Sequence[bytes], max_bytes: int | None) -> _Text:
    """Cut, encode, check and hash a text, and divide it into units."""
    kept = with_text(documents, max_bytes)
    tokens = [encode(tokenizer, document, f"document {index}") for index, document in enumerate(kept)]
    size, table = unit_size(list(map(len, kept))), byte_table(tokenizer)
    units, sizes, before = [], [], 0
    for document, ids in zip(kept, tokens, strict=True):
        edges = unit_edges(len(document), size)
        # Evenly spread where tokens have no bytes of their own: the score itself never depends on it.
        starts = np.arange(len(ids), dtype=np.int64) * len(document) // len(ids)
        if table is not None and table[ids].sum() == len(document):
            starts = np.cumsum(table[ids]) - table[ids]
        units.append(before + np.minimum(np.searchsorted(edges, starts, side="right") - 1, len(edges) - 2))
        sizes.append(np.diff(edges))
        before += len(edges) - 1
    unknown, unit_bytes = unknown_nats(tokenizer, np.concatenate(tokens)), np.concatenate(sizes)
    return _Text(
        sequences=[torch.from_numpy(np.concatenate(([tokenizer.eos_id], ids))) for ids in tokens],
        unknown=unknown,
        unit=np.concatenate(units),
        unit_bytes=unit_bytes,
        facts={
            "bytes": int(unit_bytes.sum()),
            "tokens": len(unknown),
            "unknown_tokens": int((unknown > 0).sum()),
            "unit": f"pieces of at least {size} bytes" if size else "whole documents",
            "documents": len(kept),
            "empty_documents": sum(not document for document in documents),
            "bos_rule": BOS_RULE,
            "data_sha256": data_hash(kept),
        },
    )


def _summary(text: _Text, nats: np.ndarray, **facts: Any) -> Score:
    """Totals and the interval, from the negative log-probability float64[N] of every token."""
    unit_nats = np.bincount(text.unit, weights=nats + text.unknown, minlength=len(text.unit_bytes))
    unit_tokens = np.bincount(text.unit, minlength=len(text.unit_bytes))
    bits = ratio_interval(unit_nats / math.log(2), text.unit_bytes)
    of_tokens = ratio_interval(unit_nats, unit_tokens)
    return Score(
        bits_per_byte=bits.mean,
        nats_per_token=of_tokens.mean,
        nats_per_token_stderr=of_tokens.stderr,
        nats=float(unit_nats.sum()),
        stderr=bits.stderr,
        interval=bits.bounds,
        units=bits.n,
        unit_nats=unit_nats,
        unit_bytes=text.unit_bytes,
        **text.facts,
        **facts,
    )
