"""The controls that choose the next token, named and checked, as keyword arguments of transformers' ``generate``."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ouroboros.errors import OuroborosError, check, nearest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    """Write at most this many tokens."""
    temperature: float = 0.8
    """Divide the scores by this number before a token is drawn; 0 always takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of tokens with this probability; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive scores of tokens of the text by this number and multiply others; 1 is off."""
    repetition_window: int = 0
    """Penalise only tokens that are among the last this many; 0 means the whole text."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens; 0 is off."""
    window: int | None = None
    """Show the model only the last this many tokens of the text, without a cache and without a token for the beginning
    of the text; None shows all of the text, which must fit the model's context."""
    stop: tuple[str, ...] = ()
    """End the text at any of these strings, which are left out."""

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        check(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        check(self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        check(self.repetition_window >= 0, f"repetition_window must be >= 0, got {self.repetition_window}")
        check(self.no_repeat_ngram >= 0, f"no_repeat_ngram must be >= 0, got {self.no_repeat_ngram}")
        check(self.window is None or self.window >= 1, f"window must be >= 1 or none, got {self.window}")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``generate``; what it has none for is in the list ``logits_processor``."""
        values: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        values["do_sample"] = self.temperature > 0
        if self.temperature > 0:
            values |= {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p}
        if self.no_repeat_ngram:
            values["no_repeat_ngram_size"] = self.no_repeat_ngram
        if self.repetition_penalty != 1.0 and not self.repetition_window:
            values["repetition_penalty"] = self.repetition_penalty
        elif self.repetition_penalty != 1.0:
            from transformers.generation import RepetitionPenaltyLogitsProcessor

            penalise = RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
            values["logits_processor"] = [
                lambda input_ids, scores: penalise(input_ids[:, -self.repetition_window :], scores)
            ]
        return values

    def read(self, ids: list[int]) -> list[int]:
        """The ids that the model is shown for a prompt of ``ids``, the first of which begins the text."""
        # What a window shows begins anywhere in the text, so nothing marks a beginning.
        return ids if self.window is None else ids[1:] or ids

    def with_value(self, name: str, text: str) -> Sampling:
        """These controls with the one called ``name`` as ``text`` says; all but ``stop`` can be set so.

        Raises:
            OuroborosError: there is no such control, or ``text`` is not a value of its type or range.
        """
        from pydantic import TypeAdapter, ValidationError

        kinds = {key: kind for key, kind in typing.get_type_hints(type(self)).items() if key != "stop"}
        check(name in kinds, f"unknown control {name!r}{nearest(name, kinds)}")
        reader = TypeAdapter(kinds[name])
        try:
            value = reader.validate_python(None) if text == "none" else reader.validate_strings(text)
        except ValidationError as error:
            raise OuroborosError(f"{name} cannot be {text!r}: {error.errors()[0]['msg']}") from None
        return dataclasses.replace(self, **{name: value})


StyleName = Literal["standard", "published"]
"""The controls to start from: those of this library, or those of the program published with the model's system."""
