"""The data of R-HRM: its mixture of sources, and what its published pipeline did with them.

The published pipeline (last revision) made text of a record by :func:`record_prose`, left out what
:data:`PUBLISHED_FILTERS` rejects, cut each document into blocks of its own (:func:`published_blocks`) and drew
documents at random (:func:`published_order`). Weights acted on documents, before filter and cut, so most short
documents never reached the model; :func:`shares_of` says what that does to the sources of a run. Nothing here is used
in training.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ouroboros.config import FilterSpec
from ouroboros.data.filters import Filters
from ouroboros.data.formats import Rendered, TextFormat
from ouroboros.data.prepared import PreparedData
from ouroboros.data.sources import Part
from ouroboros.errors import check

MIXTURE = (
    Part("tinygsm", "TinyGSM/TinyGSM", 0.40),
    Part("tiny-codes", "nampdn-ai/tiny-codes", 0.30),
    Part("cosmopedia", "HuggingFaceTB/cosmopedia-100k", 0.15),
    Part("metamath", "meta-math/MetaMathQA", 0.15),
)
"""The source ``mix:rhrm``, with the published weights."""
END_MARK = "\n<|endoftext|>\n"
"""What followed every text: three GPT-2 tokens (198, 50256, 198)."""
PUBLISHED_FILTERS = FilterSpec(max_characters=10_000, symbol_run=10, symbol_rule="ascii")
"""The published filter as a specification."""
MAX_SAMPLED = 2_000
"""Documents of a source that :func:`shares_of` tries the published filter on; of more, this many at even distances."""
_DECIDING_TOKENS = 50_000
"""The published filter drops texts over 10,000 characters, of which none takes more than four tokens, so this many
tokens of a document decide."""


def record_prose(record: Mapping[str, Any]) -> str:
    """The published text of a record: question and answer, ``text``, ``content``; else Python's repr of the record."""
    parts = []
    for question, answer in (("question", "answer"), ("query", "response")):
        if question in record and answer in record:
            parts.append(f"Q: {record[question]}\nA: {record[answer]}")
            break
    parts += [str(record[column]) for column in ("text", "content") if record.get(column)]
    return "\n".join(parts) if parts else str(dict(record))


class PublishedFormat(TextFormat):
    """The published text of a record without its end mark, because here the end-of-text token separates documents.

    It needs no column and reads all of them.
    """

    def __init__(self) -> None:
        super().__init__("rhrm-published", "")

    def __post_init__(self) -> None:
        """Every record has a text, so there is nothing to check."""

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\nQ:",)

    def render(self, record: Mapping[str, Any], where: str) -> Rendered | None:
        return Rendered(record_prose(record), None)


PUBLISHED_FORMAT = PublishedFormat()
"""The format ``@rhrm-published``."""


def published_text(record: Mapping[str, Any]) -> str:
    """The published training string of a record: :func:`record_prose` and the end mark."""
    return record_prose(record) + END_MARK


def published_accepts(text: str) -> bool:
    """Whether the published filter accepts ``text`` (without the end mark)."""
    return Filters(PUBLISHED_FILTERS).reason(text) is None


def published_blocks(tokens: int, block: int) -> range:
    """The first token of each block cut from one document: 0, block, 2 block ... strictly below ``tokens - block``.

    Each block has ``block`` tokens, so there are ``ceil(tokens / block) - 1`` of them: documents of up to ``block``
    tokens vanish, and every other document loses 1 to ``block`` tokens at its end.
    """
    return range(0, max(tokens - block, 0), block)


def published_order(weights: Sequence[float], lengths: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """The published order of samples, without end: (source, row), rows from 0.

    Each sample takes one weighted draw of Python's random module. A source that ends begins again; an empty one is
    drawn again.

    Raises:
        OuroborosError: every source is empty (the original would never return).
    """
    check(any(lengths), "published order: every source is empty")
    generator = random.Random(seed)  # the same numbers as the module's functions after random.seed(seed)
    rows = [itertools.cycle(range(length)) for length in lengths]
    while True:
        source = generator.choices(range(len(weights)), weights=weights)[0]
        if lengths[source]:
            yield source, next(rows[source])


def published_shares(weights: Sequence[float], acceptance: Sequence[float], blocks: Sequence[float]) -> list[float]:
    """The share of training tokens each source gets after filter and cut; sums to 1.

    Args:
        weights: of the draws, in any unit.
        acceptance: share of a source's documents that the filter accepts.
        blocks: mean number of :func:`published_blocks` of its accepted documents.

    Raises:
        OuroborosError: no source yields a block.
    """
    yields = [weight * kept * mean for weight, kept, mean in zip(weights, acceptance, blocks, strict=True)]
    check(sum(yields) > 0, "published shares: no source yields a block")
    return [value / sum(yields) for value in yields]


def shares_of(data: PreparedData) -> list[float] | None:
    """The share of training tokens each source would have had in the published pipeline, None if no block is left.

    Filter and cut are tried on the training documents that were kept, in this run's tokens, with blocks of
    ``data.sequence_length``; a text file is one document.
    """
    acceptance, blocks = [], []
    for index in range(len(data.sources)):
        starts, ids = data.offsets("train", index), data.tokens("train", index)
        count = min(len(starts) - 1, MAX_SAMPLED)
        found = []
        for document in np.linspace(0, len(starts) - 2, count).astype(np.int64).tolist():
            start, end = int(starts[document]), int(starts[document + 1])
            # The first id is the end-of-text token before the document.
            text = data.tokenizer.decode(ids[start + 1 : min(end, start + 1 + _DECIDING_TOKENS)])
            if published_accepts(text.decode("utf-8", "replace")):
                found.append(len(published_blocks(end - start, data.spec.sequence_length)))
        acceptance.append(len(found) / max(count, 1))
        blocks.append(sum(found) / max(len(found), 1))
    if not any(kept * mean for kept, mean in zip(acceptance, blocks, strict=True)):
        return None
    return published_shares(data.weights, acceptance, blocks)
