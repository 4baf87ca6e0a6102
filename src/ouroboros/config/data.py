"""What a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ouroboros.config.needs import given, needs
from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """Which documents are left out, and why; every rule is off by default. What was dropped is counted and shown.

    A plain text file named by itself is one document that the user chose: it is never left out.
    """

    min_characters: int = 0
    """Shorter documents are dropped (``short``)."""
    max_characters: int | None = None
    """Longer documents are dropped (``long``)."""
    symbol_run: int | None = None
    """Documents with this many symbols in a row, or more, are dropped (``symbols``)."""
    symbol_rule: Literal["unicode", "ascii"] = field(default="unicode", metadata=needs("symbol_run", given))
    """``unicode``: a symbol is what is neither letter, mark, number nor white space by its category; one that is
    repeated in a row counts once (rulers), and borders of tables do not count. ``ascii``: anything but ASCII letters,
    digits and white space is a symbol."""
    min_letters: float = 0.0
    """Documents with a smaller share of letters, marks and numbers among what is not white space are dropped
    (``letters``)."""
    max_repeated_lines: float = 1.0
    """Documents with a larger share of characters in lines seen before in them are dropped (``repeated lines``)."""
    max_repeated_ngrams: float = 1.0
    """Documents with a larger share of repeated 8-grams of words (of characters where there are no spaces) are dropped
    (``repeated n-grams``)."""

    def __post_init__(self) -> None:
        check(self.min_characters >= 0, f"data.filters.min_characters must be >= 0, got {self.min_characters}")
        for name in ("max_characters", "symbol_run"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"data.filters.{name} must be >= 1 or null, got {value}")
        for name in ("min_letters", "max_repeated_lines", "max_repeated_ngrams"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"data.filters.{name} must be in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where text comes from and how it becomes windows of tokens."""

    sources: tuple[str, ...] = ("python:",)
    """``python:`` or another built-in text, a file, a directory, a glob, ``hf:NAME``, ``shards:PATH`` (ids that
    ``tokenizer``, a directory, has made) or ``mix:NAME``, each with an optional ``@format`` that makes text of records
    and an optional ``=weight``. Files may be compressed with gzip or zstd."""
    tokenizer: str = "bytes"
    """``bytes``, ``chars`` (one id per character of the training split, then one for all others and the end of text),
    ``bpe:N`` (byte-level BPE of N entries trained on the training split), ``bpe-qwen:N`` (the same, cut as Qwen3.5
    does, for llama.cpp; code becomes a few per cent more tokens) or a directory."""
    sequence_length: int = 512
    """Tokens of a training window."""
    text_field: str = "text"
    """Field of jsonl, json, parquet and hub records that holds the text, where a source names no format."""
    valid_fraction: float = 0.05
    """Share of the text that is held out for validation during training."""
    test_fraction: float = 0.05
    """Share of the text that is held out for the score after training."""
    max_bytes: int | None = None
    """Read at most this many bytes of each source; with ``stream``, what is read ahead of training for the held-out
    parts and the tokenizer (4 MB by default)."""
    stream: bool = False
    """Train on the sources as they are read, without end: nothing is stored, a source that ends begins again, one that
    breaks is opened again where it stopped. ``hf:`` sources need this or ``max_bytes``."""
    filters: FilterSpec = field(default_factory=FilterSpec)
    skip_bad_records: bool = False
    """Leave out records that cannot be read (broken JSON, a missing column), counted and named, where they would
    otherwise end the run."""
    loss: Literal["all", "answers"] = "all"
    """``answers``: training learns to write answers and their end, not the questions before them: the assistant's turns
    of a chat, the last column of a format with several. Text without questions is learned whole."""

    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "data.sources is empty: name at least one source, e.g. --data notes.txt")
        check(self.sequence_length >= 2, f"data.sequence_length must be >= 2, got {self.sequence_length}")
        for name in ("valid_fraction", "test_fraction"):
            value = getattr(self, name)
            check(0 <= value < 0.5, f"data.{name} must be in [0, 0.5), got {value}")
        check(self.max_bytes is None or self.max_bytes > 0, f"data.max_bytes must be > 0, got {self.max_bytes}")
