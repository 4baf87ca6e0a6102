"""The score of the Parameter Golf challenge: a stream of ids, read in windows, in bits per byte by a table.

The stream is scored as it is in the shards: windows run across documents, and the ids between them are targets too,
which have no bytes. By default each target but the first id is scored once. The published program differs in two
points, which :func:`published_spans` and :func:`published_part` repeat: it drops what is behind the last whole window,
and with a stride it scores the last ``stride`` targets of *every* window, so that those at the end of the stream count
several times (about 1e-5 of the score on 62 million tokens).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.eval.stats import Record
from ouroboros.eval.windows import Procedure, Span, Windows, check_windows, evaluating, target_nats
from ouroboros.systems.crawler.tables import ByteTables, check_byte_counts, check_known, tables_for

SAMPLE_IDS = 20_000
"""Ids at the beginning of a stream on which the tables are tried."""


@dataclass(frozen=True, kw_only=True)
class StreamScore(Record):
    """A model's score on a stream of ids."""

    bits_per_byte: float
    nats_per_token: float
    bytes: int
    """Of the targets, by the table; what is scored twice counts twice."""
    tokens: int
    """Targets scored; what is scored twice counts twice."""
    distinct_tokens: int
    """Different targets among them."""
    stderr: None = None
    """Not known: a stream has no units."""
    loops: int | None
    window: int
    stride: int
    reading: str
    data_sha256: str
    """Of the ids as little-endian uint32."""
    model: str


def published_spans(tokens: int, window: int, stride: int, document: int = 0) -> Iterator[Span]:
    """The published windows: the first scores all of its targets, every other one its last ``stride``."""
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        yield Span(document, start, end, max(start, end - stride) if start else 0)


def published_part(ids: np.ndarray, window: int) -> np.ndarray:
    """The part of a stream that the published program scores: whole windows, and the id before them.

    Raises:
        OuroborosError: less than one window.
    """
    whole = (len(ids) - 1) // window
    check(whole >= 1, f"the stream has {len(ids)} ids, but one window needs {window + 1}; give a smaller window")
    return ids[: whole * window + 1]


def challenge(
    model: Any,
    tokenizer: TextTokenizer,
    ids: np.ndarray,
    *,
    window: int,
    stride: int,
    procedure: Procedure | None = None,
    published: bool = False,
    **facts: Any,
) -> StreamScore:
    """The scorings ``challenge`` and, with ``published``, ``challenge-published``: those of the registry's place.

    Args:
        model, ids, facts: as for :func:`score_stream`.
        tokenizer: the model's own.
        window: input ids of a window.
        stride: targets that each window after the first scores.
        procedure: how the stream is read; None: in windows.
        published: by the published tables, in the published windows and without what is behind the last whole window.

    Raises:
        OuroborosError: as :func:`score_stream`; windows out of range; an unknown token in the stream; a tokenizer whose
            table does not count the bytes of the text.
    """
    check_windows(model, window, stride)
    tables = tables_for(tokenizer, model.config.vocab_size, published=published)
    check_known(tokenizer, ids)
    if published:
        check(procedure is None, "the published score is one of plain windows; leave --rolling and --adapt out")
        procedure, ids = Windows(window, stride, plan=published_spans), published_part(ids, window)
    else:
        sample = tokenizer.decode(ids[:SAMPLE_IDS]).decode(errors="ignore").encode()  # it may end within a character
        check_byte_counts(tables, tokenizer.encode, [sample], boundary=tokenizer.eos_id)
    found = procedure or Windows(window, stride)
    return score_stream(model, ids, tables, found, window=window, stride=stride, **facts)


CHALLENGE_PUBLISHED = functools.partial(challenge, published=True)


def score_stream(
    model: Any, ids: np.ndarray, tables: ByteTables, procedure: Procedure, *, model_name: str = "", **facts: Any
) -> StreamScore:
    """Bits per byte of ``ids``, int (N + 1,), in nats summed in float64.

    Args:
        model: as for :func:`ouroboros.eval.score.score_loops`.
        ids: the stream.
        tables: of the tokenizer that it was made with.
        procedure: how it is read.
        model_name: recorded as ``model``.
        facts: the other fields of the score that say how it was read.

    Raises:
        OuroborosError: nothing to score; an id that the model lacks; a stream without bytes; a score that is not
            finite.
    """
    check(len(ids) >= 2, f"a stream of at least two ids is needed, got {len(ids)}")
    size = model.config.vocab_size
    check(int(ids.max()) < size, f"the stream has id {int(ids.max())}, but the model {size} ids: it is not the model's")
    sequence = torch.from_numpy(ids.astype(np.int64))
    target_bytes = tables.target_bytes(ids)
    times, nats = np.zeros(len(ids) - 1, np.int64), 0.0
    with evaluating(model):
        for found in procedure(model, [sequence]):
            times[found.first : found.first + len(found.log_probs)] += 1
            nats += float(target_nats(found, [sequence]).sum())
    counted, scored = int((times * target_bytes).sum()), int(times.sum())
    check(counted > 0, "the targets have no bytes by the table of the tokenizer: it is not the one of the stream")
    if not math.isfinite(nats):
        raise OuroborosError(f"the score of the stream is {nats}; the model gives NaN or probability 0")
    return StreamScore(
        bits_per_byte=nats / math.log(2) / counted,
        nats_per_token=nats / scored,
        bytes=counted,
        tokens=scored,
        distinct_tokens=int((times > 0).sum()),
        data_sha256=hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest(),
        model=model_name,
        **facts,
    )
