"""The controls that choose the next token, as keyword arguments of transformers' ``generate``, and published styles.

A style holds, as default values, the controls of the program that was published with a system. A control that only this
program has is a field of a subclass of :class:`Sampling`, whose ``options`` and ``read`` carry it out; the command line
offers it for models of the system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ouroboros.config import ModelSpec
from ouroboros.errors import check
from ouroboros.registry import found, load


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
        least = {"max_new_tokens": 1, "temperature": 0, "top_k": 0, "repetition_window": 0, "no_repeat_ngram": 0}
        for name, bound in least.items():
            check(getattr(self, name) >= bound, f"{name} must be >= {bound}, got {getattr(self, name)}")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be > 0, got {self.repetition_penalty}")
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
            values["logits_processor"] = [lambda ids, scores: penalise(ids[:, -self.repetition_window :], scores)]
        return values

    def read(self, ids: list[int]) -> list[int]:
        """The ids that the model is shown for a prompt of ``ids``, the first of which begins the text."""
        # What a window shows begins anywhere in the text, so nothing marks a beginning.
        return ids if self.window is None else ids[1:] or ids


StyleName = Literal["standard", "published"]
"""The controls to start from: those of this library, or those of the program published with the model's system."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the program published with one system chooses tokens: an entry of the registry's place ``styles``."""

    recognises: Callable[[ModelSpec], bool]
    """Whether a model with this specification is of the system."""
    sampling: Sampling
    """The controls, at the values of the published program."""


def published_sampling(model: ModelSpec) -> Sampling:
    """The controls of the program that was published with the system of a model with this specification.

    Raises:
        OuroborosError: the model is of no published system with a style.
    """
    styles: dict[str, Style] = {name: load(target) for name, target in found("styles").items()}
    fitting = [style.sampling for style in styles.values() if style.recognises(model)]
    check(
        bool(fitting),
        f"--style published: the model is of no system that has a published style ({', '.join(styles)}); leave it out",
    )
    return fitting[0]
