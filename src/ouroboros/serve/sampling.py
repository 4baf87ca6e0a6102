"""Sampling controls, as transformers' ``GenerationConfig`` knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of tokens with this probability; 1 keeps all."""
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """End at any of these strings."""

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        check(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        check(self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        check(self.no_repeat_ngram >= 0, f"no_repeat_ngram must be >= 0, got {self.no_repeat_ngram}")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        sample = self.temperature > 0
        values: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": sample, "num_beams": 1}
        if sample:
            values |= {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p}
        if self.repetition_penalty != 1.0:
            values["repetition_penalty"] = self.repetition_penalty
        if self.no_repeat_ngram:
            values["no_repeat_ngram_size"] = self.no_repeat_ngram
        return values
