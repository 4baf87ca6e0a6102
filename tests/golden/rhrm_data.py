"""Golden cases of the published R-HRM data pipeline: text of records, filter, blocks, order of samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ouroboros.data.formats import find_format
from ouroboros.systems.rhrm.data import (
    END_MARK,
    published_accepts,
    published_blocks,
    published_order,
    published_text,
    record_prose,
)


def sample_text(case: dict[str, Any], path: Path, work: Path) -> None:
    """The training string of each record, and without its end mark the text of the format ``rhrm-published``."""
    form = find_format("rhrm-published")
    for row in case["rows"]:
        # Rejected records have no string; the rule itself still gives one.
        found = published_text(row["sample"]) if published_accepts(record_prose(row["sample"])) else None
        assert found == row["text"], row
        if found is not None:
            assert form.render(row["sample"], str(path)).text == found.removesuffix(END_MARK), row


def spam_filter(case: dict[str, Any], path: Path, work: Path) -> None:
    """Which texts the published filter accepts."""
    for row in case["rows"]:
        text = row["text"]
        if text is None:
            character, length, last = row["repeat"]
            text = character * (length - 1) + last
        assert len(text) == row["length"], row
        assert published_accepts(text) == row["accepted"], row


def chunking(case: dict[str, Any], path: Path, work: Path) -> None:
    """First and last token of each block of a document, and the tokens that no block holds."""
    for row in case["rows"]:
        block = row["block"]
        blocks = published_blocks(row["tokens"], block)
        assert [[start, start + block - 1] for start in blocks] == row["chunks"], row
        assert row["tokens"] - block * len(blocks) == row["tokens_lost"], row
        assert (not blocks) == row["dummy_zero_block"], row


def interleave(case: dict[str, Any], path: Path, work: Path) -> None:
    """The first samples in order: a letter for the source and the number of the row."""
    for run in case["runs"]:
        order = published_order(run["weights"], run["source_lengths"], run["seed"])
        found = [f"{chr(ord('a') + source)}{row}" for source, row in itertools.islice(order, len(run["first"]))]
        assert found == run["first"], run["seed"]


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "the string each sample becomes before tokenising; null = rejected by the filter": sample_text,
    "accept (true) or reject (false) of the original text filter": spam_filter,
    "first and last token index of each training block cut from one document of the given token count": chunking,
    "order of samples from the original interleaver under Python's random module seeded as given": interleave,
}
"""Checker of each kind of case."""
