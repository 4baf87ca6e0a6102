"""What a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where text comes from and how it becomes windows of tokens."""

    sources: tuple[str, ...] = ("python:",)
    """``python:``, a file, a directory, a glob or ``hf:NAME``, each with an optional ``=weight``."""
    tokenizer: str = "bytes"
    """``bytes``, ``bpe:N`` (byte-level BPE of N entries trained on the training split) or a directory."""
    sequence_length: int = 512
    text_field: str = "text"
    """Field of jsonl, json and parquet records that holds the text."""
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bytes: int | None = None
    """Read at most this many bytes of each source; required for ``hf:`` streams."""

    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "data.sources is empty: name at least one source, e.g. --data notes.txt")
        check(self.sequence_length >= 2, f"data.sequence_length must be >= 2, got {self.sequence_length}")
        for name in ("valid_fraction", "test_fraction"):
            value = getattr(self, name)
            check(0 <= value < 0.5, f"data.{name} must be in [0, 0.5), got {value}")
        check(self.max_bytes is None or self.max_bytes > 0, f"data.max_bytes must be > 0, got {self.max_bytes}")
