"""Golden cases of the published R-HRM data pipeline: text of records, filter, blocks, order of samples.

The library makes the text and has the filter. Nothing in it cuts or orders documents as that pipeline did, so that
these two cases hold what the pages say of the original.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ouroboros.data.filters import Filters
from ouroboros.data.formats import find_format
from ouroboros.recipes import recipe

END_MARK = "\n<|endoftext|>\n"
"""What followed every published text."""


def accepts(text: str) -> bool:
    """Whether the filter of the published recipe accepts ``text``."""
    return Filters(recipe("rhrm-published").data.filters).reason(text) is None


def sample_text(case: dict[str, Any], path: Path, work: Path) -> None:
    """The training string of each record, without its end mark the text of the format ``rhrm-published``."""
    form = find_format("rhrm-published")
    for row in case["rows"]:
        # Rejected records have no string; the rule itself still gives one.
        found = form.render(row["sample"], str(path)).text
        assert (found + END_MARK if accepts(found) else None) == row["text"], row


def spam_filter(case: dict[str, Any], path: Path, work: Path) -> None:
    """Which texts the published filter accepts."""
    for row in case["rows"]:
        text = row["text"]
        if text is None:
            character, length, last = row["repeat"]
            text = character * (length - 1) + last
        assert len(text) == row["length"], row
        assert accepts(text) == row["accepted"], row


def chunking(case: dict[str, Any], path: Path, work: Path) -> None:
    """First and last token of each block of a document, and the tokens that no block holds."""
    for row in case["rows"]:
        block = row["block"]
        blocks = range(0, max(row["tokens"] - block, 0), block)  # so ceil(tokens / block) - 1 of them
        assert [[start, start + block - 1] for start in blocks] == row["chunks"], row
        assert row["tokens"] - block * len(blocks) == row["tokens_lost"], row
        assert (not blocks) == row["dummy_zero_block"], row


def published_order(weights: list[float], lengths: list[int], seed: int) -> Iterator[str]:
    """Samples without end, one weighted draw each; a source that ends begins again, an empty one is drawn again."""
    generator = random.Random(seed)
    rows = [itertools.cycle(range(length)) for length in lengths]
    while True:
        source = generator.choices(range(len(weights)), weights=weights)[0]
        if lengths[source]:
            yield f"{chr(ord('a') + source)}{next(rows[source])}"


def interleave(case: dict[str, Any], path: Path, work: Path) -> None:
    """The first samples in order: a letter for the source and the number of the row."""
    for run in case["runs"]:
        order = published_order(run["weights"], run["source_lengths"], run["seed"])
        assert list(itertools.islice(order, len(run["first"]))) == run["first"], run["seed"]


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "the string each sample becomes before tokenising; null = rejected by the filter": sample_text,
    "accept (true) or reject (false) of the original text filter": spam_filter,
    "first and last token index of each training block cut from one document of the given token count": chunking,
    "order of samples from the original interleaver under Python's random module seeded as given": interleave,
}
"""Checker of each kind of case."""
