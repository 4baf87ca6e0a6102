"""Sampling controls, as transformers' ``GenerationConfig`` knows them, and published variants of them."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ouroboros.errors import OuroborosError, check, nearest


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
    """Divide positive scores of tokens of the text by this number and multiply others; 1 is off."""
    repetition_window: int = 0
    """Penalise tokens among the last this many only; 0 is the whole text."""
    penalty: Literal["distinct", "occurrences"] = "distinct"
    """Penalise each token of the text once, or once for every time it occurs (R-HRM as published)."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens; 0 is off."""
    ban_triples: bool = False
    """Never write a fourth equal token in a row (R-HRM's published blocking)."""
    nucleus: Literal["reach", "pass", "within"] = "reach"
    """Whether top-p stops where the probability is reached, where it is passed (R-HRM as published), or before it is
    passed, with exactly k tokens in top-k (OSAM as published)."""
    window: int | None = None
    """The model sees the last this many tokens of the text, without a cache and without a token for the beginning of
    the text; None is all of the text, which must fit the context."""
    repeat_last: bool = False
    """Feed the last token of the prompt twice, and no token for the beginning of the text before it (OSAM as
    published): all later tokens are one place further on than in training."""
    stop: tuple[str, ...] = ()
    """End at any of these strings."""

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
        """Keyword arguments of ``generate``; what it has no argument for is a list of logits processors."""
        sample = self.temperature > 0
        values: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": sample, "num_beams": 1}
        if self.no_repeat_ngram:
            values["no_repeat_ngram_size"] = self.no_repeat_ngram
        if self._standard_penalty and self.repetition_penalty != 1.0:
            values["repetition_penalty"] = self.repetition_penalty
        if sample and self.nucleus == "reach":
            values |= {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p}
        elif sample:
            # generate() applies its own after ours, so the other order needs all of them to be ours.
            values |= {"temperature": 1.0, "top_k": None, "top_p": 1.0}
        if processors := self._processors():
            values["logits_processor"] = processors
        return values

    @property
    def _standard_penalty(self) -> bool:
        return self.penalty == "distinct" and not self.repetition_window

    def _processors(self) -> list[Any]:
        """What ``generate`` has no argument for, in the published order."""
        from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

        from ouroboros.serve.processors import NucleusPast, NucleusWithin, OccurrencePenalty, RecentPenalty, TripleBan

        found = LogitsProcessorList()
        ours = self.temperature > 0 and self.nucleus != "reach"
        if ours and self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.ban_triples:
            found.append(TripleBan())
        if self.penalty == "occurrences" and self.repetition_penalty != 1.0:
            found.append(OccurrencePenalty(self.repetition_penalty, self.repetition_window))
        elif not self._standard_penalty and self.repetition_penalty != 1.0:
            found.append(RecentPenalty(self.repetition_penalty, self.repetition_window))
        top_p = self.top_p if self.top_p < 1.0 else 0.0
        if ours and self.nucleus == "within" and (self.top_k or top_p):
            found.append(NucleusWithin(self.top_k, top_p))
        elif ours and self.nucleus == "pass":
            found += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            found += [NucleusPast(top_p)] if top_p else []
        return found

    def with_value(self, name: str, text: str) -> Sampling:
        """These controls with the one called ``name`` as ``text`` says; all but ``stop`` can be set so.

        Raises:
            OuroborosError: no such control, or not a value of its kind or range.
        """
        kinds = {key: kind for key, kind in typing.get_type_hints(Sampling).items() if key != "stop"}
        check(name in kinds, f"unknown control {name!r}{nearest(name, kinds)}")
        return dataclasses.replace(self, **{name: _value(name, text, kinds[name])})


def _value(name: str, text: str, kind: Any) -> Any:
    """``text`` as a value of the type ``kind``."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        check(text in choices, f"{name}: {text!r} is none of {', '.join(choices)}")
        return text
    if isinstance(kind, types.UnionType):
        if text == "none":
            return None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        check(text in ("on", "off"), f"{name}: {text!r} is neither on nor off")
        return text == "on"
    try:
        return kind(text)
    except ValueError:
        raise OuroborosError(f"{name}: {text!r} is not a number of the right kind") from None


Style = Literal["standard", "published"]
PUBLISHED = {
    "osam": Sampling(max_new_tokens=64, temperature=1.0, top_p=1.0, nucleus="within", repeat_last=True),
    "rhrm": Sampling(
        max_new_tokens=200,
        temperature=0.6,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.2,
        penalty="occurrences",
        ban_triples=True,
        nucleus="pass",
        window=128,
    ),
}
"""How the programs of published systems choose tokens."""


def controls(style: Style, mixer: str) -> Sampling:
    """The controls of ``style`` for a model with ``mixer`` (its ``kind``); ``published`` is R-HRM's chat for all mixers
    but OSAM's."""
    if style == "standard":
        return Sampling()
    return PUBLISHED["osam" if mixer == "osam" else "rhrm"]
