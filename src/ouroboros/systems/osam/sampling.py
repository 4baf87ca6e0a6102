"""How OSAM's published program chooses tokens.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper

from ouroboros.serve.sampling import Sampling, Style


@dataclass(frozen=True)
class NucleusWithin:
    """Top-k, and a top-p that stops before the probability is passed: the token that crosses is left out.

    Exactly ``top_k`` tokens are kept, also where others equal the last of them. Of these, renormalised, those are kept
    whose cumulative probability, their own included, is at most ``top_p``, and in any case the most probable one. The
    operations and their order are the published ones, because sums in float32 decide what is kept: rounding can leave
    out the last tokens even at a ``top_p`` of 1.

    Args:
        top_k: 0 keeps all.
        top_p: 0 keeps all.
    """

    top_k: int
    top_p: float

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores (B, V) with what is left out at minus infinity."""
        probabilities, nothing = scores_BV.softmax(dim=-1), torch.zeros_like(scores_BV, dtype=torch.bool)
        kept = ~nothing
        if self.top_k:
            kept = nothing.scatter(1, probabilities.topk(min(self.top_k, scores_BV.shape[1])).indices, True)
            probabilities = probabilities * kept
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if self.top_p:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            within = ordered.cumsum(dim=-1) <= self.top_p
            within[:, 0] = True
            kept = kept & nothing.scatter(1, order, within)
        return scores_BV.masked_fill(~kept, -torch.inf)


def repeat_last(ids: list[int]) -> list[int]:
    """A prompt as the published program feeds it, from at least one id.

    It reads all P tokens at positions 0 to P - 1, then the last of them again at position P, whose output gives the
    first new token; new token n (from 1) goes to position P + n. That is the plain order of P + 1 tokens.
    """
    return [*ids, ids[-1]]


@dataclass(frozen=True, kw_only=True)
class ProgramSampling(Sampling):
    """The controls of OSAM's published program."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    nucleus: Literal["reach", "within"] = "within"
    """Whether top-p stops where the probability is reached, or before it is passed and with exactly k tokens in top-k,
    as published."""
    repeat_last: bool = True
    """Feed the last token of the prompt twice, and no token for the beginning of the text before it, as published: all
    later tokens are then one place further on than in training."""

    def options(self) -> dict[str, Any]:
        """The published cut as one logits processor, where anything is cut."""
        values = super().options()
        if self.temperature > 0 and self.nucleus == "within":
            # generate() applies its own temperature, top-k and top-p last; the published order needs ours.
            values |= {"temperature": 1.0, "top_k": None, "top_p": 1.0}
            chain = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1.0 else []
            chain += values.pop("logits_processor", [])
            top_p = self.top_p if self.top_p < 1.0 else 0.0
            chain += [NucleusWithin(self.top_k, top_p)] if self.top_k or top_p else []
            values |= {"logits_processor": chain} if chain else {}
        return values

    def read(self, ids: list[int]) -> list[int]:
        """The ids without the one that begins the text, the last one twice; an empty prompt has none to repeat."""
        return repeat_last(ids[1:]) if self.repeat_last and len(ids) > 1 else super().read(ids)


STYLE = Style(recognises=lambda model: model.block.mixer.kind == "osam", sampling=ProgramSampling())
"""Models with OSAM's memory."""
