"""Bits per byte of the original text, every byte scored exactly once.

Each document is read as ``[eos] + tokens``; a token is predicted from the tokens before it in its document and window
(:func:`spans`). The bytes counted are those of the documents themselves. Log-probabilities are float32, sums float64.
A tokenizer of characters has one token for all that it does not know; each adds what it takes to say which of the
other Unicode characters it is (:attr:`~ouroboros.data.characters.Characters.unknown_nats`).

The interval is that of a ratio estimator, ``sum(nats) / sum(bytes)``, over units
(:func:`~ouroboros.eval.stats.ratio_stderr`). Units are whole documents where there are at least ten and none is more
than half of the text (:func:`~ouroboros.eval.stats.unit_size`); otherwise long documents are cut into pieces of 4 KiB
(:func:`~ouroboros.eval.stats.unit_edges`; a token counts in the piece where it begins). The interval says how the score
would vary over text like these units, and nothing about training seeds.

Shapes: B windows, T positions, V vocabulary. Nats are natural-log units, bits are nats / ln 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ouroboros.data.characters import REPLACEMENT
from ouroboros.errors import OuroborosError
from ouroboros.eval.stats import bounds, ratio_stderr, unit_edges, unit_size

BATCH_TOKENS = 8192
"""Input tokens of one batch when the caller gives no batch size."""
BATCH_LOGITS = 2**25
"""Logits (tokens times vocabulary) of one batch when the caller gives no batch size: 128 MiB in float32."""
BOS_RULE = "each document is preceded by one end-of-text token, which is context and is not scored"

Predict = Callable[[Any, Tensor], Tensor]
"""``predict(model, input_ids[B, T]) -> log-probabilities[B, T, V]`` of the token after each position."""


class Tokenizer(Protocol):
    """What scoring needs of a tokenizer; ``unknown``, ``unknown_id`` and ``unknown_nats`` of
    :class:`~ouroboros.data.tokenize.TextTokenizer` are used where it has them."""

    @property
    def eos_id(self) -> int:
        """The end-of-text token."""
        ...

    def encode(self, text: bytes, /) -> np.ndarray:
        """Token ids of ``text``, one-dimensional, without special tokens."""
        ...

    def decode(self, ids: np.ndarray, /) -> bytes:
        """The bytes that the ids stand for."""
        ...

    def token_bytes(self) -> np.ndarray:
        """The number of bytes of each token id; an OuroborosError when ids have no bytes of their own."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
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
    bos_rule: str
    data_sha256: str
    model: str
    unit_nats: np.ndarray = field(repr=False)
    """float64[units]: nats of each unit, in document order."""
    unit_bytes: np.ndarray = field(repr=False)
    """int64[units]: bytes of each unit."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the arrays per unit."""
        kept = (f.name for f in dataclasses.fields(self) if f.name not in ("unit_nats", "unit_bytes"))
        values = {name: getattr(self, name) for name in kept}
        return values | {"interval": None if self.interval is None else list(self.interval)}


class Span(NamedTuple):
    """One window over a document's ``[eos] + tokens``: inputs ``start:end``, scores the targets ``first:end``.

    Target ``i`` is token ``i`` of the document, predicted at input position ``i`` (the token before it).
    """

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


def log_probs(model: Any, input_ids: Tensor) -> Tensor:
    """The default :data:`Predict`: float32 log-softmax of ``model(input_ids=...).logits``."""
    uses_cache = hasattr(getattr(model, "config", None), "use_cache")
    output = model(input_ids=input_ids, use_cache=False) if uses_cache else model(input_ids=input_ids)
    return torch.log_softmax(output.logits.float(), dim=-1)


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


def at_loops(model: Any, loops: int | None) -> Any:
    """``model``, or its view with another loop count.

    Raises:
        OuroborosError: a loop count was given for a model that has none.
    """
    if loops is None:
        return model
    if not hasattr(model, "with_loops"):
        raise OuroborosError(f"loops={loops}: {type(model).__name__} has no loops; leave the loop count out")
    return model.with_loops(loops)


def data_hash(documents: Sequence[bytes]) -> str:
    """sha256 of the text: of the bytes of a single document, else of the documents' digests in order.

    Empty documents do not count. One whole file has the hash that ``sha256sum`` prints.
    """
    digests = [hashlib.sha256(document) for document in documents if document]
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def encode(tokenizer: Tokenizer, document: bytes, name: str = "document") -> np.ndarray:
    """Token ids int64[T] of a document, checked to give back exactly its bytes, but for characters that the tokenizer
    says it does not know.

    Raises:
        OuroborosError: the tokenizer loses or changes bytes, so its tokens do not score the original text.
    """
    ids = np.asarray(tokenizer.encode(document), dtype=np.int64)
    expected, unknown = document, unknown_characters(tokenizer, document)
    if unknown:
        expected = document.decode().translate(dict.fromkeys(map(ord, unknown), REPLACEMENT)).encode()
    if bytes(tokenizer.decode(ids)) != expected:
        raise OuroborosError(
            f"{name}: this tokenizer does not give back the same bytes (it is not lossless), so bits per byte of the"
            " original text cannot be measured; use a byte or byte-level BPE tokenizer"
        )
    return ids


def unknown_characters(tokenizer: Tokenizer, document: bytes) -> Mapping[str, int]:
    """How often each character that the tokenizer says it does not know occurs in ``document``."""
    count = getattr(tokenizer, "unknown", None)
    return {} if count is None else count(document)


def unknown_nats(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """What a score adds to the nats of each token, float64[T]: more than 0 where it stands for an unknown character."""
    unknown = getattr(tokenizer, "unknown_id", None)
    if unknown is None:
        return np.zeros(len(ids))
    return np.where(ids == unknown, getattr(tokenizer, "unknown_nats", 0.0), 0.0)


def score(
    model: Any,
    tokenizer: Tokenizer,
    documents: Sequence[bytes],
    *,
    window: int,
    stride: int | None = None,
    loops: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    unit_bytes: int | None = None,
    model_name: str = "",
    device: torch.device | str | None = None,
    amp: torch.dtype | None = None,
    predict: Predict = log_probs,
) -> Score:
    """Score ``documents`` in bits per byte; the module's docstring says how.

    Args:
        model: ``model(input_ids=LongTensor[B, T]).logits`` is [B, T, V]; causal.
        tokenizer: the model's own; it must give back the bytes of each document.
        documents: the texts. Empty ones are skipped and counted.
        window: input tokens of a window, at most ``model.config.max_position_embeddings``.
        stride: targets that each window after the first scores; None means ``window`` (disjoint windows).
        loops: loop count, by ``model.with_loops``; None leaves the model as it is.
        batch_size: windows per batch; None means as many as fit in about 8192 tokens and 2**25 logits.
        max_bytes: score the first so many bytes only; the last document is cut, not inside a UTF-8 character.
        unit_bytes: bytes of the interval's units; 0 keeps documents whole, None chooses as above.
        model_name: recorded as ``model``.
        device: where the inputs go; None means where the model's first parameter is.
        amp: autocast type, for example ``torch.bfloat16``; None leaves autocast alone.
        predict: log-probabilities of a batch, for models that are not a plain softmax over logits.

    Raises:
        OuroborosError: nothing to score, a window or stride out of range, a tokenizer that is not lossless or
            does not belong to the model, scores that are not finite.
    """
    stride = window if stride is None else stride
    _check_windows(model, window, stride)
    kept = _limited(documents, max_bytes)
    tokens = [encode(tokenizer, document, f"document {index}") for index, document in enumerate(kept)]
    _check_vocabulary(model, tokens, tokenizer.eos_id)
    view = at_loops(model, loops)
    device = device_of(model) if device is None else torch.device(device)
    batches = _batches(tokens, window, stride, batch_size, getattr(model.config, "vocab_size", None) or 1)
    with evaluating(view), nullcontext() if amp is None else torch.autocast(device.type, dtype=amp):
        nats = _token_nats(view, tokens, batches, tokenizer.eos_id, device, predict)
    size = unit_size(list(map(len, kept)), unit_bytes)
    return _summary(
        *_units(kept, tokens, nats, tokenizer, size),
        unknown_tokens=sum(int((unknown_nats(tokenizer, ids) > 0).sum()) for ids in tokens),
        unit=f"pieces of at least {size} bytes" if size else "whole documents",
        documents=len(kept),
        empty_documents=sum(not document for document in documents),
        loops=loops if loops is not None else getattr(getattr(view, "schedule", None), "loops", None),
        window=window,
        stride=stride,
        data_sha256=data_hash(kept),
        model=model_name,
    )


def score_loops(
    model: Any, tokenizer: Tokenizer, documents: Sequence[bytes], loops: Sequence[int], **options: Any
) -> list[Score]:
    """One :func:`score` per loop count, with the same options; the depth curve of one model."""
    return [score(model, tokenizer, documents, loops=count, **options) for count in loops]


def _check_windows(model: Any, window: int, stride: int) -> None:
    if window < 1:
        raise OuroborosError(f"window must be >= 1, got {window}")
    if not 1 <= stride <= window:
        raise OuroborosError(f"stride must be between 1 and the window ({window}), got {stride}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise OuroborosError(
            f"window {window} is longer than the model's context (max_position_embeddings {longest}):"
            f" give {longest} or less"
        )


def _check_vocabulary(model: Any, tokens: Sequence[np.ndarray], eos: int) -> None:
    size = getattr(model.config, "vocab_size", None)
    top = max(eos, *(int(ids.max()) for ids in tokens))
    if size and top >= size:
        raise OuroborosError(
            f"token id {top} does not fit the model's vocab_size {size}: this tokenizer is not the model's own"
        )


def first_bytes(document: bytes, size: int) -> bytes:
    """At most ``size`` bytes of a document, cut before a UTF-8 character rather than inside it."""
    end = size
    while max(0, size - 3) < end < len(document) and 0x80 <= document[end] < 0xC0:
        end -= 1
    return bytes(document[:end])


def _limited(documents: Sequence[bytes], max_bytes: int | None) -> list[bytes]:
    """The documents that are not empty, up to ``max_bytes`` in all, the last one cut."""
    if max_bytes is not None and max_bytes < 1:
        raise OuroborosError(f"max_bytes must be >= 1, got {max_bytes}")
    left = sum(map(len, documents)) if max_bytes is None else max_bytes
    kept = []
    for document in documents:
        if left > 0 and (part := first_bytes(document, left)):
            kept.append(part)
        left -= len(document)
    if not kept:
        raise OuroborosError("no data to score: every document is empty; give a text with at least one byte")
    return kept


def byte_table(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of each token id, int64[V], or ``None`` for a tokenizer whose ids have no bytes of their own."""
    try:
        return np.asarray(tokenizer.token_bytes(), dtype=np.int64)
    except OuroborosError:
        return None


def _token_starts(table: np.ndarray | None, ids: np.ndarray, length: int) -> np.ndarray:
    """Byte offset of each token in a document of ``length`` bytes."""
    if table is not None:
        ends = np.cumsum(table[ids])
        if ends[-1] == length:
            return ends - table[ids]
    # Evenly spread: only the assignment to the interval's units depends on it, never the score.
    return np.arange(len(ids), dtype=np.int64) * length // len(ids)


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter or buffer is, else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _batches(
    tokens: Sequence[np.ndarray], window: int, stride: int, batch_size: int | None, vocabulary: int
) -> Iterator[list[Span]]:
    """Windows of like length together, longest first, so that padding costs little."""
    todo = [span for index, ids in enumerate(tokens) for span in spans(len(ids), window, stride, index)]
    todo.sort(key=lambda span: span.start - span.end)
    limit = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
    at = 0
    while at < len(todo):
        count = batch_size or max(1, limit // (todo[at].end - todo[at].start))
        yield todo[at : at + count]
        at += count


def _token_nats(
    model: Any,
    tokens: Sequence[np.ndarray],
    batches: Iterator[list[Span]],
    eos: int,
    device: torch.device,
    predict: Predict,
) -> list[np.ndarray]:
    """Negative log-probability, float64[T], of every token of every document."""
    sequences = [torch.from_numpy(np.concatenate(([eos], ids))) for ids in tokens]
    nats = [np.zeros(len(ids)) for ids in tokens]
    times = [np.zeros(len(ids), dtype=np.uint8) for ids in tokens]
    for batch in batches:
        length = max(span.end - span.start for span in batch)
        # Padding is on the right, where a causal model cannot see it from any scored position.
        inputs = torch.full((len(batch), length), eos, dtype=torch.long)
        targets = torch.full((len(batch), length), eos, dtype=torch.long)
        for row, (document, start, end, _) in enumerate(batch):
            sequence = sequences[document]
            inputs[row, : end - start] = sequence[start:end]
            targets[row, : end - start] = sequence[start + 1 : end + 1]
        found = predict(model, inputs.to(device)).gather(-1, targets.to(device)[..., None])[..., 0]
        losses = -found.to("cpu", torch.float64).numpy()
        for row, (document, start, end, first) in enumerate(batch):
            nats[document][first:end] = losses[row, first - start : end - start]
            times[document][first:end] += 1
    if not all((count == 1).all() for count in times):
        raise AssertionError("a token was not scored exactly once")
    for index, values in enumerate(nats):
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise OuroborosError(
                f"document {index}: the score of token {token} is {values[token]}; the model gives NaN or probability 0"
            )
    return nats


def _units(
    documents: Sequence[bytes],
    tokens: Sequence[np.ndarray],
    nats: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    unit_bytes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats float64[units], bytes and tokens int64[units]; a token counts in the unit where it begins."""
    table = byte_table(tokenizer)
    unit_nats, unit_sizes, unit_tokens = [], [], []
    for document, ids, values in zip(documents, tokens, nats, strict=True):
        values = values + unknown_nats(tokenizer, ids)
        edges = unit_edges(len(document), unit_bytes)
        starts = _token_starts(table, ids, len(document))
        unit = np.minimum(np.searchsorted(edges, starts, side="right") - 1, len(edges) - 2)
        unit_nats.append(np.bincount(unit, weights=values, minlength=len(edges) - 1))
        unit_sizes.append(np.diff(edges))
        unit_tokens.append(np.bincount(unit, minlength=len(edges) - 1))
    return np.concatenate(unit_nats), np.concatenate(unit_sizes), np.concatenate(unit_tokens)


def _summary(unit_nats: np.ndarray, unit_bytes: np.ndarray, unit_tokens: np.ndarray, **facts: Any) -> Score:
    """Totals and the interval."""
    nats, size, units = float(unit_nats.sum()), int(unit_bytes.sum()), len(unit_bytes)
    tokens = int(unit_tokens.sum())
    bits_per_byte = nats / math.log(2) / size
    stderr = ratio_stderr(unit_nats / math.log(2), unit_bytes)
    low, high = bounds(bits_per_byte, stderr, units)
    return Score(
        bits_per_byte=bits_per_byte,
        nats_per_token=nats / tokens,
        nats_per_token_stderr=ratio_stderr(unit_nats, unit_tokens),
        bytes=size,
        tokens=tokens,
        nats=nats,
        stderr=stderr,
        interval=None if low is None or high is None else (low, high),
        units=units,
        bos_rule=BOS_RULE,
        unit_nats=unit_nats,
        unit_bytes=unit_bytes,
        **facts,
    )
